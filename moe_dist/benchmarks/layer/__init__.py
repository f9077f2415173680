"""Whole feed-forward layers side by side: ours and the peers', on ranks, as the experts grow, and part by part."""
