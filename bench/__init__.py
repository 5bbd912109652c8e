"""Speed beside a peer and beside the machine's limit, in one run; rows go to results.jsonl."""
