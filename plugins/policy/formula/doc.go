// Package formula holds the arithmetic of checkpoint intervals: pure functions of
// durations in seconds, rates per second and pages. Each names its source. They hold
// no state, and answer every input with a number: what makes no sense (a negative
// rate, no time between failures) is said on the function.
package formula
