"""The finance-operations world: a ledger with planted month-end differences, eight tools, three tenants, scenarios and judges.

world.py          FinanceOps, the World that the pipeline loads by name
books.py          one company's books from (split, seed) in SQLite;  schema.sql, chart.py, names.py, calendar.py, money.py
ledger.py         double-entry arithmetic;  differences.py  the five planted month-end differences and their truth
toolspecs.py      the tools as the model sees them;  tools.py  their work over SQL;  environment.py  one private live copy
policies/         three tenants' passages, approval limits, Cedar permissions
answers.py        the answer JSON;  styles.py  house and tenant styles;  prompts.py  the system prompt
wording/          requests composed from phrase files, fragments owned by one split each
scenarios/        requests with gold continuations: lookups, control, judgements, reconcile
verifiers/        the judges
"""

from posttrain.worlds.finance_ops.world import FinanceOps

__all__ = ["FinanceOps"]
