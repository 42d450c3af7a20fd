"""What every study shares: training, tuning, campaigns, clocks, statistics, records."""
