"""Engines that run on our operators without a fork: a module each, which nothing imports unasked."""
