"""`python -m service serve` and `python -m service create-api-key`: `useg` without the other commands."""

import json
import sys

from cyclopts import App, CycloptsError
from pydantic import ValidationError

from model.errors import UsegError
from service.cli import app, create_api_key
from service.settings import describe_errors

root = App(name="useg")
root.command(app)
root.command(create_api_key)
try:
    result = root(exit_on_error=False, print_error=False, result_action="return_value")
    if isinstance(result, dict):
        print(json.dumps(result, indent=2))
except (UsegError, CycloptsError) as error:
    cause = error.__cause__
    print(f"useg: {describe_errors(cause) if isinstance(cause, ValidationError) else error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, CycloptsError) else 1)
