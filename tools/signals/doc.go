// Package signals checks what ckagent says about running VMs against loads that are
// known, and carries what watches over ckagent itself: the alert rules and the
// dashboard for Prometheus and Grafana (prometheus/).
//
// It has no code but tests. They run the binary that users get against QEMU guests
// that write a known number of pages, sleep a known share of their time, answer
// requests at known moments. By default a short form runs (under 40 s in all);
// CKAGENT_SIGNALS_CAMPAIGN=1 runs every load of docs/signals.md, about half an hour.
package signals
