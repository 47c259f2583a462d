package guardian

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm/inject"
)

// stateDir is where guardians say what they guard: on tmpfs, as it ends with the
// host's boot. CKAGENT_RUN_DIR moves it, for agents that are not root.
var stateDir = func() string {
	if d := os.Getenv("CKAGENT_RUN_DIR"); d != "" {
		return d
	}
	return "/run/ckagent"
}()

const (
	stateSchema    = "ckagent.guardian-state/1"
	maxStateBytes  = 1 << 20
	maxStateScan   = 4096 // entries looked at when stale ones are removed
	reportSuffix   = ".report.json"
	controlSuffix  = ".control"
	stateSuffix    = ".json"
	maxKnownFDs    = 65536
	stateTimestamp = time.RFC3339Nano
)

// state is what a guardian leaves in the state directory while it guards, for
// `ckagent release` to find when nobody is left.
type state struct {
	Schema   string            `json:"schema"`
	QEMU     identity          `json:"qemu"`
	Agent    identity          `json:"agent"`
	Guardian identity          `json:"guardian"`
	Server   identity          `json:"fault_server"`
	QMP      qmp.Endpoint      `json:"qmp"`
	Known    []inject.Leftover `json:"known"` // descriptors of QEMU's own that look like ours
	Since    string            `json:"since"`
}

// statePath is the common beginning of the files of one VM.
func statePath(dir string, qemu identity) string {
	return filepath.Join(dir, fmt.Sprintf("%d-%d", qemu.PID, qemu.StartTicks))
}

// writeState makes the files of a VM; the control page is linked in if it lives
// on the same file system.
func writeState(dir string, s state, control *os.File) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	base := statePath(dir, s.QEMU)
	_ = os.Remove(base + controlSuffix)
	// An O_TMPFILE can be given a name; a memfd cannot, and is done without.
	err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", control.Fd()),
		unix.AT_FDCWD, base+controlSuffix, unix.AT_SYMLINK_FOLLOW)
	if err != nil && !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("name control page: %w", err)
	}
	return writeJSON(base+stateSuffix, s)
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// readState reads the file of a VM; os.ErrNotExist if there is none. Files that
// are not ours to trust are refused.
func readState(dir string, qemu identity) (state, error) {
	f, err := os.OpenFile(statePath(dir, qemu)+stateSuffix, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return state{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxStateBytes+1))
	if err != nil {
		return state{}, err
	}
	s, err := decodeState(b)
	if err != nil {
		return state{}, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if s.QEMU != qemu {
		return state{}, fmt.Errorf("%s: is about pid %d started at %d", f.Name(), s.QEMU.PID, s.QEMU.StartTicks)
	}
	return s, nil
}

// decodeState is bounded and checks what is acted on later.
func decodeState(b []byte) (state, error) {
	var s state
	if len(b) > maxStateBytes {
		return s, fmt.Errorf("more than %d bytes", maxStateBytes)
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, err
	}
	if s.Schema != stateSchema {
		return s, fmt.Errorf("schema %q, want %q", s.Schema, stateSchema)
	}
	if s.QEMU.PID <= 0 || len(s.Known) > maxKnownFDs {
		return s, errors.New("malformed")
	}
	for _, id := range []identity{s.Agent, s.Guardian, s.Server} {
		if id.PID < 0 || id.PID == 1 {
			return s, fmt.Errorf("pid %d cannot be one of ours", id.PID)
		}
	}
	return s, nil
}

// openNamedControl maps the control page of a VM, if it was given a name.
func openNamedControl(dir string, qemu identity) (*Control, error) {
	f, err := os.OpenFile(statePath(dir, qemu)+controlSuffix, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return OpenControl(f)
}

// removeState removes what is about one VM, but not the report.
func removeState(dir string, qemu identity) {
	base := statePath(dir, qemu)
	_ = os.Remove(base + stateSuffix)
	_ = os.Remove(base + controlSuffix)
}

// removeStale removes the files of processes that are no more.
func removeStale(dir string) {
	d, err := os.Open(dir)
	if err != nil {
		return
	}
	defer d.Close()
	names, _ := d.Readdirnames(maxStateScan)
	for _, name := range names {
		pid, rest, ok1 := strings.Cut(name, "-")
		ticks, _, ok2 := strings.Cut(rest, ".")
		if !ok1 || !ok2 {
			continue
		}
		p, err1 := strconv.Atoi(pid)
		t, err2 := strconv.ParseUint(ticks, 10, 64)
		if err1 == nil && err2 == nil && !(identity{p, t}).alive() {
			_ = os.Remove(filepath.Join(dir, name))
		}
	}
}
