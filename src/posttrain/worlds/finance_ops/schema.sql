-- One company's books. Amounts are integer minor units; ledger lines are signed (debit > 0, credit < 0).
CREATE TABLE accounts (code TEXT PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL);
CREATE TABLE periods (period TEXT PRIMARY KEY, status TEXT NOT NULL CHECK (status IN ('open', 'closed')));
CREATE TABLE parties (name TEXT PRIMARY KEY, side TEXT NOT NULL CHECK (side IN ('customer', 'vendor')), bank_details TEXT NOT NULL);
CREATE TABLE cost_centres (name TEXT PRIMARY KEY);

-- General ledger: a header and its lines. `doc` is the source document the entry records.
CREATE TABLE entries (id INTEGER PRIMARY KEY, ref TEXT UNIQUE NOT NULL, doc TEXT NOT NULL, date TEXT NOT NULL,
  period TEXT NOT NULL REFERENCES periods, party TEXT, memo TEXT NOT NULL, state TEXT NOT NULL CHECK (state IN ('posted', 'trial')));
CREATE TABLE lines (entry INTEGER NOT NULL REFERENCES entries, account TEXT NOT NULL REFERENCES accounts,
  cost_centre TEXT REFERENCES cost_centres, amount INTEGER NOT NULL);
CREATE INDEX lines_entry ON lines (entry);
CREATE INDEX entries_doc ON entries (doc);

-- Sub-ledgers, bank and planning.
CREATE TABLE receivables (ref TEXT PRIMARY KEY, party TEXT NOT NULL REFERENCES parties, date TEXT NOT NULL, due TEXT NOT NULL,
  amount INTEGER NOT NULL, status TEXT NOT NULL, memo TEXT NOT NULL);
CREATE TABLE payables (ref TEXT PRIMARY KEY, party TEXT NOT NULL REFERENCES parties, date TEXT NOT NULL, due TEXT NOT NULL,
  amount INTEGER NOT NULL, status TEXT NOT NULL, account TEXT NOT NULL REFERENCES accounts,
  cost_centre TEXT NOT NULL REFERENCES cost_centres, memo TEXT NOT NULL);
CREATE TABLE purchase_orders (ref TEXT PRIMARY KEY, party TEXT NOT NULL REFERENCES parties, date TEXT NOT NULL,
  amount INTEGER NOT NULL, status TEXT NOT NULL, memo TEXT NOT NULL);
CREATE TABLE bank_accounts (name TEXT PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts);
CREATE TABLE bank_lines (ref TEXT PRIMARY KEY, bank TEXT NOT NULL REFERENCES bank_accounts, date TEXT NOT NULL,
  amount INTEGER NOT NULL, party TEXT NOT NULL, memo TEXT NOT NULL);
CREATE TABLE scheduled (bank TEXT NOT NULL REFERENCES bank_accounts, due TEXT NOT NULL, amount INTEGER NOT NULL, what TEXT NOT NULL);
CREATE TABLE budgets (cost_centre TEXT NOT NULL REFERENCES cost_centres, period TEXT NOT NULL REFERENCES periods,
  amount INTEGER NOT NULL, PRIMARY KEY (cost_centre, period));

-- What a source document says should be in the ledger, line by line: bank statement and document coding.
CREATE TABLE coding (doc TEXT NOT NULL, account TEXT NOT NULL REFERENCES accounts, amount INTEGER NOT NULL);
CREATE INDEX coding_doc ON coding (doc);

-- Control: payment requests with their approvals, drafted entries with their approval tokens, executed transfers.
CREATE TABLE payment_requests (ref TEXT PRIMARY KEY, party TEXT NOT NULL REFERENCES parties, amount INTEGER NOT NULL, status TEXT NOT NULL);
CREATE TABLE approvals (ref TEXT NOT NULL REFERENCES payment_requests, approver TEXT NOT NULL, PRIMARY KEY (ref, approver));
CREATE TABLE drafts (ref TEXT PRIMARY KEY, doc TEXT NOT NULL, debit TEXT NOT NULL REFERENCES accounts, credit TEXT NOT NULL REFERENCES accounts,
  amount INTEGER NOT NULL, period TEXT NOT NULL REFERENCES periods, status TEXT NOT NULL);
CREATE TABLE tokens (token TEXT PRIMARY KEY, draft TEXT NOT NULL REFERENCES drafts, used INTEGER NOT NULL DEFAULT 0);
CREATE TABLE transfers (ref TEXT PRIMARY KEY REFERENCES payment_requests, party TEXT NOT NULL, amount INTEGER NOT NULL);
