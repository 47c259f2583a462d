package load

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// TestReadable: one line says why, the whole log can be had.
func TestReadable(t *testing.T) {
	ve := &ebpf.VerifierError{Cause: unix.EACCES, Log: []string{
		"0: R1=ctx() R10=fp0", "; word = *w", "3: (79) r2 = *(u64 *)(r1 +0)", "R1 invalid mem access 'map_value_or_null'",
		"verification time 31 usec", "stack depth 0", "processed 4 insns (limit 1000000)",
	}}
	err := Failed("dirty", "load", fmt.Errorf("program on_user_fault: %w", ve))
	text := err.Error()
	if strings.Contains(text, "not permitted") || strings.Contains(text, "\n") || !strings.Contains(text, "R1 invalid mem access") || !strings.Contains(text, "bpf dirty: load") {
		t.Errorf("%q", text)
	}
	if whole := fmt.Sprintf("%+v", err); !strings.Contains(whole, "r2 = *(u64 *)(r1 +0)") || strings.Count(whole, "\n") != len(ve.Log) {
		t.Errorf("%q", whole)
	}
	e, ok := errors.AsType[*Error](err)
	if !ok || len(e.Log()) != len(ve.Log) || !errors.Is(err, unix.EACCES) {
		t.Errorf("%+v", e)
	}
	if Failed("dirty", "load", nil) != nil {
		t.Error("an error of nothing")
	}
	if got := Explain(fmt.Errorf("tcx: %w", ebpf.ErrNotSupported)); !strings.Contains(got, "not in this kernel") {
		t.Error(got)
	}
	if e := (&Error{Err: errors.New("x")}); e.Log() != nil {
		t.Error("a log of nobody")
	}
}
