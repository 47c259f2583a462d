package vmtest

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"testing"
	"time"
)

// Start is Launch for a test: failures end the test, the machine ends with it,
// and its logs are shown if the test fails. With -short the test is skipped.
func Start(t testing.TB, cfg Config) *VM {
	t.Helper()
	if testing.Short() {
		Skip(t, "guest", "needs a guest; left out with -short")
	}
	if cfg.Dir == "" {
		// Not t.TempDir: its names are too long for a socket's 108 bytes.
		dir, err := os.MkdirTemp("", "vmtest-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		cfg.Dir = dir
	}
	ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
	defer cancel()
	v, err := Launch(ctx, cfg)
	if err != nil {
		t.Fatalf("vmtest: %v", err)
	}
	v.belongTo(t)
	return v
}

// StartAdopted is Adopt for a test.
func StartAdopted(t testing.TB, pid int, qmp, serial string, from int64) *VM {
	t.Helper()
	v, err := Adopt(pid, qmp, serial, from)
	if err != nil {
		t.Fatalf("vmtest: %v", err)
	}
	v.belongTo(t)
	return v
}

func (v *VM) belongTo(t testing.TB) {
	v.tb = t
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("vmtest: pid %d, end of console:\n%s\nQEMU said:\n%s", v.pid, lastLines(v.Serial(), 20), v.Messages())
		}
		v.Kill()
	})
}

// WaitSerial waits until a line of the console matches (an expression; plain
// text matches itself unless it has special characters) and returns it.
func (v *VM) WaitSerial(t testing.TB, expr string, timeout time.Duration) string {
	t.Helper()
	if _, err := regexp.Compile(expr); err != nil {
		expr = regexp.QuoteMeta(expr)
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	line, err := v.AwaitSerial(ctx, expr)
	if err != nil {
		t.Fatalf("vmtest: %v\nconsole:\n%s", err, lastLines(v.Serial(), 20))
	}
	return line
}

// WaitProgress waits until the guest has written n more pages.
func (v *VM) WaitProgress(t testing.TB, n uint64) Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
	defer cancel()
	r, err := v.AwaitProgress(ctx, n)
	if err != nil {
		t.Fatalf("vmtest: %v\nconsole:\n%s", err, lastLines(v.Serial(), 20))
	}
	return r
}

// WaitSweeps waits until the guest has read and verified its whole working set n
// more times.
func (v *VM) WaitSweeps(t testing.TB, n uint64) Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
	defer cancel()
	r, err := v.AwaitSweeps(ctx, n)
	if err != nil {
		t.Fatalf("vmtest: %v\nconsole:\n%s", err, lastLines(v.Serial(), 20))
	}
	return r
}

// WaitLog waits until n more records of the guest's disk log are safe.
func (v *VM) WaitLog(t testing.TB, n uint64) Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
	defer cancel()
	r, err := v.AwaitLog(ctx, n)
	if err != nil {
		t.Fatalf("vmtest: %v\nconsole:\n%s", err, lastLines(v.Serial(), 20))
	}
	return r
}

// WaitLogSweeps waits until the guest has read all of its disk log n more times.
func (v *VM) WaitLogSweeps(t testing.TB, n uint64) Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), defaultTimeout)
	defer cancel()
	r, err := v.AwaitLogSweeps(ctx, n)
	if err != nil {
		t.Fatalf("vmtest: %v\nconsole:\n%s", err, lastLines(v.Serial(), 20))
	}
	return r
}

// Skip ends a test that cannot run here. id is stable and short (kvm, ext4).
// The line "SKIP-REASON <id>: <reason>" goes to standard output, which go test
// shows with -v and -json, and is appended to the file CKAGENT_SKIPS names, which
// continuous integration compares with the list it expects.
func Skip(t testing.TB, id, format string, args ...any) {
	t.Helper()
	line := skipLine(id, format, args...)
	fmt.Println(line)
	if path := os.Getenv("CKAGENT_SKIPS"); path != "" {
		if err := appendLine(path, line); err != nil {
			t.Fatalf("vmtest: record a skip: %v", err)
		}
	}
	t.Skip(line)
}

func skipLine(id, format string, args ...any) string {
	return "SKIP-REASON " + id + ": " + fmt.Sprintf(format, args...)
}

// appendLine is one write to a file opened for appending: lines of test binaries
// that run at the same time do not mix.
func appendLine(path, line string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}
