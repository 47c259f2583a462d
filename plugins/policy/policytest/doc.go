// Package policytest is what every policy program has to pass, in whatever language it
// is written:
//
//	func TestPolicy(t *testing.T) { policytest.Run(t, policytest.Build(t, "."), nil) }
//
// Build is for programs in Go; any other is tested by its path.
//
// The program is run as ckagent runs it: installed in a directory that only root may
// write (the test needs root), verified, without environment or input, over mutual
// TLS, within its limits and deadlines. Nothing of it is left after the test.
package policytest
