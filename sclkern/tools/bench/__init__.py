"""What benchmarks and their reports share: the workload's sizes, their least cost, the machine's rates, the records."""
