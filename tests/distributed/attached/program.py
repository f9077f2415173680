"""Program that knows nothing of moe-dist: every collective once or twice, on the ranks that its launcher starts."""

import sys

import torch
import torch.distributed as dist


def main(store: str, rank: int, ranks: int) -> None:
    """Run all collectives with tensors of 4 bytes an element."""
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    even = dist.new_group([0, 1])
    x = torch.ones(12)
    dist.all_reduce(x)
    dist.all_reduce(x, async_op=True).wait()
    dist.all_gather_into_tensor(torch.empty(12 * ranks), x)
    dist.reduce_scatter_tensor(torch.empty(12 // ranks), x)
    dist.broadcast(x, 0)
    sent, received = ([2, 4, 6], [2 * (rank + 1)] * 3)
    dist.all_to_all_single(torch.empty(sum(received)), x, received, sent)
    if rank == 0:
        dist.send(x[:5], 2)
    if rank == 2:
        dist.recv(torch.empty(5), 0)
    if rank < 2:
        dist.all_reduce(x, group=even)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2, bias=False))
    model(torch.ones(1, 3)).sum().backward()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
