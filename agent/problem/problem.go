package problem

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Code is the machine-readable class of a failure; it decides the exit code.
type Code string

const (
	Failed    Code = "failed"    // tried and did not work; nothing was lost
	Usage     Code = "usage"     // the command line makes no sense
	Refused   Code = "refused"   // cannot or must not be done; nothing was touched
	Integrity Code = "integrity" // stored data is not what was written
	Busy      Code = "busy"      // somebody else is at it; try again
	NotFound  Code = "not_found" // no such process, VM or checkpoint
	Store     Code = "store"     // the store is full or cannot be reached
	NoDaemon  Code = "no_daemon" // no daemon answers
	Cancelled Code = "cancelled" // somebody asked us to stop
)

// exitCodes is the contract of the command line (docs/operations.md).
var exitCodes = map[Code]int{
	Failed: 1, Usage: 2, Refused: 3, Integrity: 4, Busy: 5,
	NotFound: 6, Store: 7, NoDaemon: 8, Cancelled: 130,
}

// Error says what failed, on what, why, and what to do.
type Error struct {
	Code      Code
	Op        string // the operation, as a verb: "attach", "arm", "write segment"
	Object    string // what it was done to: "pid 4711", "RAMBlock pc.ram", a path
	Hint      string // what the operator can do; may be empty
	Retryable bool   // the same call may succeed later without a change
	Err       error  // the cause; may be nil
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Object != "" {
		b.WriteByte(' ')
		b.WriteString(e.Object)
	}
	if e.Err != nil {
		b.WriteString(": ")
		b.WriteString(e.Err.Error())
	}
	if e.Hint != "" {
		b.WriteString(" (")
		b.WriteString(e.Hint)
		b.WriteByte(')')
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// New builds an Error whose cause is the formatted text (%w keeps a wrapped cause).
func New(code Code, op, object, format string, args ...any) *Error {
	return &Error{Code: code, Op: op, Object: object, Err: fmt.Errorf(format, args...),
		Retryable: code == Busy || code == Store}
}

// WithHint returns e with the advice set.
func (e *Error) WithHint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// CodeOf is the code of the outermost Error in err's chain; a cancelled context
// is Cancelled, anything else Failed.
func CodeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	if errors.Is(err, context.Canceled) {
		return Cancelled
	}
	return Failed
}

// Is reports whether the outermost Error in err's chain has this code.
func Is(err error, code Code) bool { return err != nil && CodeOf(err) == code }

// ExitCode is what the process ends with: 0 for nil.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	if code, ok := exitCodes[CodeOf(err)]; ok {
		return code
	}
	return exitCodes[Failed] // a code read from a file may be anything; an error is never 0
}
