"""`python -m core.tenants NAME`: makes a tenant's first key and prints it; for the operator, beside the database."""

import argparse
import sys

from core.db import session_scope
from core.tenants.keys import SCOPES, create_key, ensure_tenant


def main() -> None:
    """Prints a new key of the tenant, which is made if it does not exist."""
    parser = argparse.ArgumentParser(prog="python -m core.tenants", description=main.__doc__)
    parser.add_argument("tenant", help="name of the tenant, the first part of its models' names")
    parser.add_argument("--name", default="operator", help="what the key is called in lists")
    parser.add_argument("--scope", action="append", choices=SCOPES, help="may be repeated; all scopes by default")
    arguments = parser.parse_args()
    with session_scope() as session:
        tenant = ensure_tenant(session, arguments.tenant)
        _, key = create_key(session, tenant.id, arguments.name, arguments.scope or list(SCOPES))
    sys.stdout.write(f"{key}\n")


if __name__ == "__main__":
    main()
