"""sweeps: their settings, and the numbers and results of their trials"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Not by batch: that copies the table, which SQLite refuses while rows of other tables point to it.
    op.add_column("jobs", sa.Column("trial_number", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("trial", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("jobs", sa.Column("sweep", sa.JSON(none_as_null=True), nullable=True))
    op.create_index("ix_jobs_parent_job_id_trial_number", "jobs", ["parent_job_id", "trial_number"], unique=True)
