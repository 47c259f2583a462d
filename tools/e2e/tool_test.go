package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Exit codes of the command line, as scripts know them.
const (
	exitOK        = 0
	exitFailed    = 1
	exitUsage     = 2
	exitRefused   = 3
	exitIntegrity = 4
	exitBusy      = 5
	exitNotFound  = 6
	exitStore     = 7
	exitCancelled = 130
)

// codes are the names that JSON errors have for them.
var codes = map[int]string{exitFailed: "failed", exitUsage: "usage", exitRefused: "refused", exitIntegrity: "integrity",
	exitBusy: "busy", exitNotFound: "not_found", exitStore: "store", exitCancelled: "cancelled"}

// runTimeout is far beyond what any verb takes on a busy machine.
const runTimeout = 3 * time.Minute

// tool is ckagent with a store, in a directory of one test.
type tool struct {
	bin   string
	store string
	netns string // that it runs in; "": ours
}

// newTool links the binary into a directory of the test. Its processes must be
// gone when the test ends.
func newTool(t testing.TB) *tool {
	t.Helper()
	dir, err := os.MkdirTemp(filepath.Dir(release), "t-")
	if err != nil {
		t.Fatal(err)
	}
	x := &tool{bin: filepath.Join(dir, "ckagent"), store: filepath.Join(dir, "store")}
	if err := os.Link(release, x.bin); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		x.wantNoProcess(t)
		os.RemoveAll(dir)
	})
	return x
}

// command is ckagent, ready to start, in a process group of its own.
func (x *tool) command(ctx context.Context, args ...string) *exec.Cmd {
	argv := append([]string{x.bin}, args...)
	if x.netns != "" {
		argv = append([]string{"ip", "netns", "exec", x.netns}, argv...)
	}
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.WaitDelay = 10 * time.Second
	return c
}

// result is a verb that ended.
type result struct {
	args     []string
	code     int
	out, err string
}

func (r result) String() string {
	return fmt.Sprintf("ckagent %s: exit %d\nstdout: %s\nstderr: %s", strings.Join(r.args, " "), r.code, r.out, r.err)
}

// run runs a verb to its end.
func (x *tool) run(t testing.TB, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout)
	defer cancel()
	var out, errs bytes.Buffer
	c := x.command(ctx, args...)
	c.Stdout, c.Stderr = &out, &errs
	err := c.Run()
	if _, ended := errors.AsType[*exec.ExitError](err); err != nil && !ended {
		t.Fatalf("ckagent %s: %v\n%s", strings.Join(args, " "), err, errs.String())
	}
	return result{args, c.ProcessState.ExitCode(), out.String(), errs.String()}
}

// json runs a verb with --json that must succeed, and decodes the one object it
// printed into out.
func (x *tool) json(t testing.TB, out any, args ...string) {
	t.Helper()
	r := x.run(t, append(args, "--json")...)
	if r.code != exitOK {
		t.Fatalf("want success: %s", r)
	}
	if err := oneObject(r.out, out); err != nil {
		t.Fatalf("%v: %s", err, r)
	}
}

// oneObject decodes what must be exactly one JSON object on one line, with a
// schema.
func oneObject(text string, out any) error {
	line, rest, whole := strings.Cut(text, "\n")
	if !whole || rest != "" {
		return fmt.Errorf("want one line on stdout, got %q", text)
	}
	var head struct {
		Schema string `json:"schema"`
	}
	if err := json.Unmarshal([]byte(line), &head); err != nil {
		return err
	}
	if !strings.HasPrefix(head.Schema, "ckagent.") {
		return fmt.Errorf("object without schema: %q", text)
	}
	return json.Unmarshal([]byte(line), out)
}

// failure is the JSON form of an error.
type failure struct {
	Code      string `json:"code"`
	Op        string `json:"op"`
	Object    string `json:"object"`
	Message   string `json:"message"`
	Hint      string `json:"hint"`
	Retryable bool   `json:"retryable"`
}

// failureOf decodes the one error object of a verb that was run with --json.
func failureOf(r result) (failure, error) {
	var f struct {
		Error *failure `json:"error"`
	}
	if err := oneObject(r.out, &f); err != nil {
		return failure{}, err
	}
	if f.Error == nil {
		return failure{}, errors.New("no error object")
	}
	return *f.Error, nil
}

// fails runs a verb with --json that must fail with the exit code and say all of
// the words.
func (x *tool) fails(t testing.TB, code int, words []string, args ...string) failure {
	t.Helper()
	return wantFailure(t, x.run(t, append([]string{"--json"}, args...)...), code, words...)
}

// wantFailure checks exit code, JSON object and text of a failed verb.
func wantFailure(t testing.TB, r result, code int, words ...string) failure {
	t.Helper()
	if r.code != code {
		t.Errorf("want exit %d: %s", code, r)
		return failure{}
	}
	f, err := failureOf(r)
	if err != nil {
		t.Errorf("%v: %s", err, r)
		return f
	}
	if f.Code != codes[code] || f.Op == "" || f.Message == "" {
		t.Errorf("want code %q, an operation and a message: %s", codes[code], r)
	}
	for _, w := range words {
		if !strings.Contains(f.Message+" "+f.Object+" "+f.Hint, w) {
			t.Errorf("the error does not mention %q: %+v", w, f)
		}
	}
	for _, leak := range []string{"goroutine ", "panic:"} {
		if strings.Contains(r.out+r.err, leak) {
			t.Errorf("the program crashed: %s", r)
		}
	}
	return f
}

// checkpoint is what a checkpoint reports.
type checkpoint struct {
	ID            string   `json:"id"`
	VM            string   `json:"vm"`
	QEMUPID       int      `json:"qemu_pid"`
	Mode          string   `json:"mode"`
	Engine        string   `json:"engine"`
	Parent        string   `json:"parent"`
	Depth         int      `json:"depth"`
	Unchanged     uint64   `json:"unchanged_pages"`
	Shared        uint64   `json:"shared_pages"`
	Same          uint64   `json:"same_pages"`
	RAMBytes      uint64   `json:"ram_bytes"`
	PageBytes     uint64   `json:"page_bytes"`
	Pages         uint64   `json:"pages"`
	ZeroPages     uint64   `json:"zero_pages"`
	CapturedPages uint64   `json:"captured_pages"`
	StoredBytes   uint64   `json:"stored_bytes"`
	PauseNS       int64    `json:"pause_ns"`
	ArmNS         int64    `json:"arm_ns"`
	DeviceStateNS int64    `json:"device_state_ns"`
	TotalNS       int64    `json:"total_ns"`
	ScanNS        int64    `json:"scan_ns"`
	Faults        uint64   `json:"faults"`
	FaultP50NS    int64    `json:"fault_p50_ns"`
	Retaken       []string `json:"retaken"`
	Notes         []string `json:"notes"`
}

// checkpoint takes one that must succeed. On a machine that is so busy that our
// own helpers are late, the guardian gives up on purpose: exit 5, and as with any
// busy VM the way is to try again.
func (x *tool) checkpoint(t testing.TB, pid int, args ...string) (c checkpoint) {
	t.Helper()
	args = append([]string{"checkpoint", strconv.Itoa(pid), "--store", x.store, "--json"}, args...)
	r := x.run(t, args...)
	for range maxRetries {
		if r.code != exitBusy && !r.givenUp() {
			break
		}
		t.Logf("again: %s", r)
		r = x.run(t, args...)
	}
	if r.code != exitOK {
		t.Fatalf("want success: %s", r)
	}
	if err := oneObject(r.out, &c); err != nil {
		t.Fatalf("%v: %s", err, r)
	}
	if c.QEMUPID != pid || c.ID == "" || c.Pages == 0 || c.Pages*c.PageBytes != c.RAMBytes || c.TotalNS <= 0 {
		t.Errorf("checkpoint reports nonsense: %+v", c)
	}
	return c
}

const maxRetries = 3

// givenUp reports whether the guardian ended ckagent because it had no sign of
// life of it.
func (r result) givenUp() bool { return strings.Contains(r.err, "no sign of life") }

// restored is what a restore reports.
type restored struct {
	ID          string   `json:"id"`
	VM          string   `json:"vm"`
	Name        string   `json:"name"`
	QEMUPID     int      `json:"qemu_pid"`
	QMP         string   `json:"qmp"`
	RunDir      string   `json:"run_dir"`
	Lazy        bool     `json:"lazy"`
	Paused      bool     `json:"paused"`
	RAMBytes    uint64   `json:"ram_bytes"`
	LazyBytes   uint64   `json:"lazy_bytes"`
	ReadyNS     int64    `json:"ready_ns"`
	ResumeNS    int64    `json:"resume_ns"`
	RunningNS   int64    `json:"command_to_running_ns"`
	DrainedNS   int64    `json:"drained_ns"`
	Faults      uint64   `json:"faults"`
	Notes       []string `json:"notes"`
	Clock       string   `json:"clock"`
	ClockStepNS int64    `json:"clock_step_ns"`
	ChangesRaw  []any    `json:"changes"`
	Disks       []struct{ Name, Path, Backing string }
}

// listed is one line of ls.
type listed struct {
	ID     string `json:"id"`
	VM     string `json:"vm"`
	Mode   string `json:"mode"`
	Damage string `json:"damage"`
	Leased bool   `json:"leased"`
}

func (x *tool) ls(t testing.TB) []listed {
	t.Helper()
	var l struct {
		Checkpoints []listed `json:"checkpoints"`
	}
	x.json(t, &l, "ls", "--store", x.store)
	return l.Checkpoints
}

// dir is where the store keeps a checkpoint.
func (x *tool) dir(t testing.TB, id string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(x.store, "vms", "*", id))
	if err != nil || len(found) != 1 {
		t.Fatalf("directory of %s: %v %v", id, found, err)
	}
	return found[0]
}

// wantOnly fails if ls shows a checkpoint other than these, or if gc leaves
// the rest of one behind.
func (x *tool) wantOnly(t testing.TB, ids ...string) {
	t.Helper()
	var have []string
	for _, c := range x.ls(t) {
		have = append(have, c.ID)
	}
	if len(have) != len(ids) {
		t.Errorf("ls shows %v, want %v", have, ids)
	}
	if _, err := os.Stat(filepath.Join(x.store, "store.json")); os.IsNotExist(err) && len(ids) == 0 {
		return // nothing ever was begun: there is no store
	}
	if r := x.run(t, "gc", "--store", x.store, "--json"); r.code != exitOK {
		t.Errorf("gc: %s", r)
	}
	left, err := filepath.Glob(filepath.Join(x.store, "vms", "*", "2*")) // ids; volumes stay beside them
	if err != nil || len(left) != len(ids) {
		t.Errorf("gc leaves %v (%v), want %v", left, err, ids)
	}
}

// lookEvery is how often a state is looked at that is waited for: a look is a process,
// and one after the other they would take the processor from what is waited for.
const lookEvery = 100 * time.Millisecond

// within looks until something is true.
func within(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// hasBecome is within for a state, which is told of if it does not come to be as wanted.
func hasBecome[S any](t testing.TB, limit time.Duration, what string, look func() (S, bool), ok func(S) bool) (s S) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("last it was %+v", s)
		}
	}()
	within(t, limit, what, func() bool {
		now, seen := look()
		if seen {
			s = now
		}
		return seen && ok(s)
	})
	return s
}
