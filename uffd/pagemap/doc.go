// Package pagemap reads /proc/PID/pagemap: which pages are there, and which
// were written since they were write-protected (PAGEMAP_SCAN, Linux 6.7; plain
// entries before).
package pagemap
