"""Groups of commands, with help that is not cut."""

from typing import Any

from typer.core import TyperGroup

_UNLIMITED = 10_000  # characters


class CommandGroup(TyperGroup):
    """Group whose help has the first sentence of each command whole, over several lines."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, each.get_short_help_str(_UNLIMITED)) for name, each in commands.items() if each])
