package qmp

import (
	"errors"
	"fmt"
)

// Sentinels. ErrExited implies ErrLost: errors.Is holds for both.
var (
	ErrLost     = errors.New("the QMP connection was lost")
	ErrExited   = errors.New("QEMU has exited")
	ErrClosed   = errors.New("the QMP client is closed")
	ErrBusy     = errors.New("no greeting: somebody else is connected to this monitor, or QEMU does not run")
	ErrProtocol = errors.New("the peer does not speak QMP")
	ErrTooLarge = errors.New("QMP message too large")
	ErrNoFD     = errors.New("descriptors can only be passed over a unix socket, one per command")
)

// Error is QEMU's own refusal of a command, word for word.
type Error struct {
	Class string `json:"class"` // "GenericError", "CommandNotFound", "DeviceNotFound", ...
	Desc  string `json:"desc"`
}

func (e *Error) Error() string {
	if e.Class == "" || e.Class == "GenericError" {
		return e.Desc
	}
	return e.Desc + " [" + e.Class + "]"
}

// IsCommandNotFound reports whether err is QEMU not knowing a command, which is
// how a feature of another release announces its absence.
func IsCommandNotFound(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Class == "CommandNotFound"
}

// IsManagerPaused reports whether a machine was not resumed because it was paused
// through libvirt, which is not ours to undo.
func IsManagerPaused(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Class == ClassManagerPaused
}

// lostError is the end of a connection: what became of it, and why.
type lostError struct {
	exited bool
	reason string // of the SHUTDOWN event, if one came
	cause  error  // io.EOF, ECONNRESET, ErrProtocol, ...
}

func (e *lostError) Error() string {
	what := ErrLost
	if e.exited {
		what = ErrExited
	}
	if e.reason != "" {
		return fmt.Sprintf("%v (%s): %v", what, e.reason, e.cause)
	}
	return fmt.Sprintf("%v: %v", what, e.cause)
}

func (e *lostError) Is(target error) bool {
	return target == ErrLost || target == ErrExited && e.exited
}

func (e *lostError) Unwrap() error { return e.cause }
