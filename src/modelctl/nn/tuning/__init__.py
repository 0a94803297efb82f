"""Before a fine-tuning starts: a new head, the statistics of its images, the range of its lr."""
