"""The databases that a ledger can be in: how they are reached, and brought up to date."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from penstock.core.errors import StartupError

PASSWORD = "PENSTOCK_LEDGER_PASSWORD"
"""Environment variable with PostgreSQL's password."""
_MIGRATION_LOCK = 0x70656E73746F636B


def make_engine(url: str) -> sa.Engine:
    """The database of a URL, which is not reached yet. Raises StartupError for one that cannot be."""
    try:
        parsed = sa.make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ValueError(f"{parsed.drivername} is no database that a ledger can be in")
        if parsed.get_backend_name() == "postgresql":
            if parsed.password is None and os.environ.get(PASSWORD):
                parsed = parsed.set(password=os.environ[PASSWORD])
            return sa.create_engine(
                parsed, pool_size=2, pool_pre_ping=True, connect_args={"connect_timeout": 5}
            )
        if parsed.database in (None, "", ":memory:"):
            raise ValueError("a ledger in memory is none; name a file")
        folder = Path(str(parsed.database)).parent
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        engine = sa.create_engine(parsed, connect_args={"timeout": 5.0, "check_same_thread": False})
    except ModuleNotFoundError:
        raise StartupError(
            "A ledger in PostgreSQL needs a driver.", advice='pip install "penstock[pg]"'
        ) from None
    except (sa.exc.ArgumentError, ValueError) as error:
        raise StartupError(
            f"The ledger's URL cannot be used: {str(error).splitlines()[0]}.",
            param="ledger.url",
            advice="It is sqlite:///FILE or postgresql://USER@HOST/DATABASE.",
        ) from None

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so
        for pragma in ("journal_mode=WAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # a transaction that will write takes the lock first: one that has read cannot wait for it
        reads = connection.get_execution_options().get("penstock_reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def make_private(engine: sa.Engine) -> None:
    """Make SQLite's file, where it is not there yet, for its owner only: it has who asked what, and what that
    cost. Its -wal and -shm get the same mode from SQLite. Raises StartupError."""
    file = str(engine.url.database)
    if engine.dialect.name != "sqlite" or file.startswith("file:"):
        return
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise StartupError(
            f"The ledger {file} cannot be made: {error.strerror or error}.", param="ledger.url"
        ) from None


def migrate(engine: sa.Engine) -> None:
    """Bring the tables up to date. Raises StartupError for those of a later version, SQLAlchemyError."""
    folder = Path(__file__).parent / "migrations"
    if _version(engine) == max(path.name[1:5] for path in (folder / "versions").glob("v[0-9]*.py")):
        return  # as nearly always, and alembic takes longer to import than many a command to run
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        found = MigrationContext.configure(connection).get_current_revision()
        if found == script.get_current_head():
            return
        if found is not None and found not in {each.revision for each in script.walk_revisions()}:
            raise StartupError(
                f"The ledger's tables are of a later version ({found}).",
                advice="Use that version of Penstock.",
            )
        config.attributes["connection"] = connection

        def upgrade(revision: Any, _: Any) -> Any:
            return script._upgrade_revs("head", revision)

        with EnvironmentContext(config, script, fn=upgrade):
            script.run_env()


def _version(engine: sa.Engine) -> str | None:
    """Of the tables that are there; None where there are none, or the database cannot be reached."""
    try:
        with engine.connect().execution_options(penstock_reads=True) as connection:
            found: str | None = connection.execute(
                sa.text("SELECT version_num FROM alembic_version")
            ).scalar_one_or_none()
            return found
    except SQLAlchemyError:
        return None


def said(error: SQLAlchemyError) -> str:
    """What the database said, in a line."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0].rstrip(".")
