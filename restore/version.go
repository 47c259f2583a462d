package restore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/restore/plan"
)

// A device state moves to newer QEMUs of the same versioned machine type. To an
// older one it moves as long as that one knows the machine type and every section's
// version; QEMU would only say so after it was started, and in fewer words.

const (
	askWithin = 20 * time.Second // for one answer of a QEMU binary, on a busy host
	maxAnswer = 16 << 20
)

// checkVersion refuses a QEMU that cannot load the device state, before it is
// started. Asking it takes some tens of milliseconds, which are saved where it is
// the very file that ran the VM.
func (x *run) checkVersion(ctx context.Context) error {
	if x.m.QEMU.Version == "" || x.sameBinary() {
		return nil
	}
	a := asked{plan: x.plan}
	var g errgroup.Group
	var version, machines string
	g.Go(func() (err error) { version, err = a.ask(ctx, "-version"); return err })
	g.Go(func() (err error) { machines, err = a.ask(ctx, "-machine", "help"); return err })
	if err := g.Wait(); err != nil {
		return problem.New(problem.CodeOf(err), "ask", x.plan.Binary, "%w", err).WithHint("is it a QEMU that runs on this host?")
	}
	v, err := parseVersion(version)
	if err != nil {
		return problem.New(problem.Refused, "ask", x.plan.Binary, "%w", err).WithHint("name a QEMU: --qemu PATH")
	}
	if !knowsMachine(machines, x.plan.Machine) {
		return x.tooOld(v.String(), "it does not know machine type %s", x.plan.Machine)
	}
	if !olderThan(v, x.m.QEMU.Version) {
		return nil
	}
	state, err := x.r.DeviceState(ctx)
	if err != nil {
		return err
	}
	known, err := a.ask(ctx, "-machine", x.plan.Machine, "-dump-vmstate", "/dev/stdout")
	if err != nil {
		return x.tooOld(v.String(), "which sections of a device state it knows cannot be told: %w", err)
	}
	newer, err := newerSection(state, []byte(known))
	if err != nil {
		return x.tooOld(v.String(), "which sections of a device state it knows cannot be told: %w", err)
	}
	if newer != "" {
		return x.tooOld(v.String(), "%s", newer)
	}
	x.older = true
	x.note("QEMU %s is older than the checkpoint's %s; it knows the machine type and the version of every device", v, x.m.QEMU.Version)
	return nil
}

// tooOld is the refusal of a QEMU.
func (x *run) tooOld(version, why string, args ...any) error {
	return problem.New(problem.Refused, "restore", x.plan.Binary, "it is QEMU %s, the checkpoint was taken on %s, and %w",
		version, x.m.QEMU.Version, fmt.Errorf(why, args...)).
		WithHint("start one that can load it: --qemu PATH; PATH -machine help lists the machine types it knows")
}

// sameBinary reports whether the QEMU to be started is the file that ran the VM: the
// same path on the same boot of the same host, untouched since before the
// checkpoint. (A program's change time cannot be set back.)
func (x *run) sameBinary() bool {
	if x.plan.Binary != x.m.QEMU.BinaryPath {
		return false
	}
	boot, err := liveness.BootID()
	if err != nil || boot != x.m.Machine.Facts[image.FactBootID] {
		return false
	}
	var st unix.Stat_t
	if err := unix.Stat(x.plan.Binary, &st); err != nil {
		return false
	}
	return time.Unix(st.Ctim.Unix()).Before(x.m.CreatedAt)
}

// asked is a QEMU that is asked what it is, with the rights and the environment it
// would be started with.
type asked struct{ plan *plan.Plan }

func (a asked) ask(ctx context.Context, args ...string) (string, error) {
	ctx, stop := context.WithTimeout(ctx, askWithin)
	defer stop()
	c := exec.CommandContext(ctx, a.plan.Binary, args...)
	c.Env, c.Dir = environ(a.plan), "/"
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: credential(a.plan)}
	c.WaitDelay = time.Second
	out, errs := &limited{left: maxAnswer}, &limited{left: 4 << 10}
	c.Stdout, c.Stderr = out, errs
	if err := c.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if text := strings.TrimSpace(errs.String()); text != "" {
			err = fmt.Errorf("%w: %.300s", err, text)
		}
		return "", fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	return out.String(), nil
}

// limited keeps the beginning of what is written to it.
type limited struct {
	bytes.Buffer
	left int
}

var errTooLong = errors.New("it says too much")

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.left {
		return 0, errTooLong
	}
	l.left -= len(p)
	return l.Buffer.Write(p)
}

var versionLine = regexp.MustCompile(`(?m)^QEMU emulator version (\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?`)

func parseVersion(text string) (v qmp.Version, err error) {
	m := versionLine.FindStringSubmatch(text)
	if m == nil {
		return v, fmt.Errorf("it says %.80q to -version: not a QEMU", text)
	}
	for i, n := range []*int{&v.Major, &v.Minor, &v.Micro} {
		if m[i+1] == "" {
			break
		}
		if *n, err = strconv.Atoi(m[i+1]); err != nil {
			return v, err
		}
	}
	return v, nil
}

// knowsMachine looks a machine type up in what `-machine help` lists: the first
// word of a line.
func knowsMachine(list, machine string) bool {
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == machine {
			return true
		}
	}
	return false
}

// olderThan compares with a recorded "major.minor.micro"; an unknown one is not
// newer.
func olderThan(v qmp.Version, recorded string) bool {
	var major, minor int
	if n, _ := fmt.Sscanf(recorded, "%d.%d", &major, &minor); n != 2 {
		return false
	}
	return !v.AtLeast(major, minor)
}

// newerSection compares the sections of a device state with what a QEMU says it can
// load (-dump-vmstate) and names one that is too new for it. Sections of what is no
// device (timers, the CPUs' common part) are not in that list; QEMU itself refuses
// them when it loads what it does not know.
func newerSection(state, dump []byte) (string, error) {
	var devices map[string]json.RawMessage
	if err := json.Unmarshal(dump, &devices); err != nil {
		return "", fmt.Errorf("-dump-vmstate: %w", err)
	}
	known := map[string]uint32{}
	for _, raw := range devices {
		var d struct {
			Description struct {
				Name    string `json:"name"`
				Version uint32 `json:"version_id"`
			} `json:"Description"`
		}
		if json.Unmarshal(raw, &d) == nil && d.Description.Name != "" { // one entry is the machine's, of another form
			known[d.Description.Name] = max(known[d.Description.Name], d.Description.Version)
		}
	}
	if len(known) == 0 {
		return "", errors.New("-dump-vmstate names no device")
	}
	l, err := vmstate.Parse(state)
	if err != nil {
		return "", err
	}
	for _, s := range l.Sections {
		name := path.Base(s.Name)
		if v, ok := known[name]; ok && s.Version > v {
			return fmt.Sprintf("the state of device %s is of version %d, of which it knows %d at most", s.Name, s.Version, v), nil
		}
	}
	return "", nil
}
