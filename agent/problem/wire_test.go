package problem

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// An error reads the same after it was sent, and means the same.
func TestWire(t *testing.T) {
	for _, err := range []error{
		New(Busy, "attach", "VM a", "held by %w", unix.EBUSY).WithHint("wait"),
		&Error{Code: Refused, Op: "protect"},
		errors.Join(fmt.Errorf("around: %w", New(Store, "write", "/x", "%w", unix.ENOSPC))),
		errors.New("plain"),
	} {
		text, jerr := json.Marshal(ToWire("do", err))
		if jerr != nil {
			t.Fatal(jerr)
		}
		var w Wire
		if jerr := json.Unmarshal(text, &w); jerr != nil {
			t.Fatal(jerr)
		}
		got := w.Err()
		want := err
		if p, ok := errors.AsType[*Error](err); ok {
			want = p
		} else {
			want = &Error{Code: Failed, Op: "do", Err: err}
		}
		if got.Error() != want.Error() || CodeOf(got) != CodeOf(want) || ExitCode(got) != ExitCode(want) {
			t.Errorf("%v became %v", want, got)
		}
	}
	if ToWire("do", nil) != nil {
		t.Error("no error became one")
	}
}
