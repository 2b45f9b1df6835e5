"""What runs next, who leaves where, who is answered; and the threads that run it. Neither HTTP nor the budget is known
here: an operating point comes from above, batches go to an `Engine`."""
