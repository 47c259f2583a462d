package policy

import (
	"math"
	"slices"
	"time"
)

// How soon a failed checkpoint is tried again: soon after the first failure, twice as
// late after each one more, in minutes at last.
const (
	firstRetry = 10 * time.Second
	lastRetry  = 320 * time.Second
)

// Failures counts the checkpoints that failed since the last that did not, and says when
// the last of them was tried.
func Failures(s *Signals) (n int, lastNS int64) {
	for _, c := range slices.Backward(s.GetHistory()) {
		if c.GetOk() {
			break
		}
		if n++; n == 1 {
			lastNS = c.GetAtNs()
		}
	}
	return n, lastNS
}

// Retry is the first instant at which the next checkpoint is to be tried after failures,
// by a policy that wants one every interval; 0 if the last did not fail. A policy that
// asks for the next one at once would stop a guest again and again for nothing.
func Retry(s *Signals, intervalNS int64) (atNS int64) {
	n, last := Failures(s)
	if n == 0 {
		return 0
	}
	wait := min(float64(firstRetry)*math.Pow(2, float64(n-1)), float64(lastRetry), max(float64(intervalNS), float64(firstRetry)))
	return last + int64(wait)
}
