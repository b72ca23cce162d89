"""State in SQL: the tables, their migrations, and one module per noun. The only place with SQL.

Functions take the session of `Database.read()` or `Database.write()` first, so that callers decide what is one
transaction. Rows come back detached and are read-only by convention.
"""
