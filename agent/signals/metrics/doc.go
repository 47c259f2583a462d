// Package metrics gives what package signals knows to Prometheus, and serves it on
// the loopback interface. docs/signals.md says what each series means and costs.
//
// A scrape reads the last snapshot and never waits for a VM; the store is listed at
// most every ten seconds. Serve ends with its context, after the requests under way.
package metrics
