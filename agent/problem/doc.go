// Package problem is the vocabulary of failure: one error type that says which
// operation failed, on what object, why, and what the operator can do about it,
// and the exit code a command ends with because of it.
//
// Libraries return *problem.Error (or wrap one with %w); only the command line
// prints it. A problem keeps the errno it was caused by, so errors.Is(err,
// unix.ENOSPC) still holds at the top.
package problem
