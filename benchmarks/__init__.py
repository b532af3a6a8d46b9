"Measurements of many seeds, or of time, beside what is stored of them: see README.md"
