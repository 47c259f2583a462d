// Package load turns what the kernel answers to a BPF object into something that
// an operator can read and a developer can work with: the message is one line,
// the whole log of the verifier is one format verb (%+v) or one method away.
package load

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Error is a BPF object that could not be loaded or attached.
type Error struct {
	Object string // the package: "dirty", "net", ...
	Doing  string // "load", "attach on_user_fault"
	Err    error
}

// Failed wraps what the kernel or the loader answered; nil stays nil.
func Failed(object, doing string, err error) error {
	if err == nil {
		return nil
	}
	return &Error{Object: object, Doing: doing, Err: err}
}

func (e *Error) Error() string {
	return fmt.Sprintf("bpf %s: %s: %s", e.Object, e.Doing, Explain(e.Err))
}

func (e *Error) Unwrap() error { return e.Err }

// Log is what the verifier said, line by line; nil if it was not the verifier.
func (e *Error) Log() []string {
	if ve, ok := errors.AsType[*ebpf.VerifierError](e.Err); ok {
		return ve.Log
	}
	return nil
}

// Format adds the verifier's whole log to %+v.
func (e *Error) Format(f fmt.State, verb rune) {
	_, _ = io.WriteString(f, e.Error())
	if verb == 'v' && f.Flag('+') {
		for _, line := range e.Log() {
			_, _ = io.WriteString(f, "\n\t"+line)
		}
	}
}

// Explain shortens what the loader says to the line that says why.
func Explain(err error) string {
	text := err.Error()
	if ve, ok := errors.AsType[*ebpf.VerifierError](err); ok {
		text = ve.Cause.Error()
		if line := reason(ve.Log); line != "" {
			// A verdict, not a lack of rights, though the errno is the same.
			return "this kernel's verifier refuses it: " + line
		}
	}
	text, _, _ = strings.Cut(text, "\n")
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return fmt.Sprintf("not permitted (missing capability, lockdown, or kernel.unprivileged_bpf_disabled): %s", text)
	case errors.Is(err, ebpf.ErrNotSupported):
		return "not in this kernel: " + text
	}
	return text
}

// reason is the line of a verifier's log that says what it disliked: the last one
// that is neither statistics nor a register dump.
func reason(log []string) string {
	for i := len(log) - 1; i >= 0; i-- {
		line := strings.TrimSpace(log[i])
		if line == "" || strings.HasPrefix(line, "processed ") || strings.HasPrefix(line, "verification time") ||
			strings.HasPrefix(line, "stack depth") {
			continue
		}
		return line
	}
	return ""
}
