package plugins

import (
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// TestMain is the tests' main, and that of the programs they install: copies of the
// test binary, which behave by the name they were installed under.
func TestMain(m *testing.M) {
	if os.Getenv(policy.Handshake.MagicCookieKey) == policy.Handshake.MagicCookieValue {
		beProgram(filepath.Base(os.Args[0]))
		return
	}
	if dir := os.Getenv(hostVariable); dir != "" {
		beHost(dir, os.Args[1])
		return
	}
	goleak.VerifyTestMain(m)
}

// beHost starts a program, says so, and waits to be killed.
func beHost(registry, temp string) {
	p, err := NewRegistry(registry).Lookup("steady")
	if err == nil {
		_, err = (&Host{TempDir: temp}).Start(context.Background(), p, nil)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Print(".")
	select {}
}

// beProgram is one that keeps to the contract until its parameters say otherwise
// (rogue), or one that does not even begin to.
func beProgram(name string) {
	unixLine := func(cert string) string {
		return fmt.Sprintf("1|1|unix|%s|grpc|%s", filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "x"), cert)
	}
	switch name {
	case "rogue", "steady":
		policy.Serve(newRogue)
	case "mute":
		select {}
	case "noise":
		fmt.Println("hello, world")
		select {}
	case "endless":
		for {
			fmt.Print(strings.Repeat("x", 1<<16))
		}
	case "quits":
		fmt.Fprintln(os.Stderr, "no such library")
		os.Exit(127)
	case "old":
		h := policy.Handshake
		h.ProtocolVersion = 0
		goplugin.Serve(&goplugin.ServeConfig{HandshakeConfig: h, Plugins: goplugin.PluginSet{policy.PluginName: &policy.Plugin{New: newRogue}}, GRPCServer: goplugin.DefaultGRPCServer})
	case "naked":
		fmt.Println(unixLine(""))
		select {}
	case "stranger": // its certificate is not one
		fmt.Println(unixLine(base64.RawStdEncoding.EncodeToString(make([]byte, 100))))
		select {}
	case "network":
		fmt.Println("1|1|tcp|127.0.0.1:1|grpc|")
		select {}
	case "frozen": // shakes hands, listens, and stands still
		l, err := net.Listen("unix", filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "x"))
		if err != nil {
			os.Exit(1)
		}
		defer l.Close()
		fmt.Println(unixLine(aCertificate()))
		_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
		select {}
	case "orphans": // leaves a child behind, in a session of its own, that holds its output
		c := exec.Command("/bin/sleep", "600")
		c.Stdout, c.Stderr = os.Stdout, os.Stderr
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := c.Start(); err != nil {
			os.Exit(1)
		}
		fmt.Println("orphan", c.Process.Pid)
		os.Exit(0)
	}
}

// rogue decides "in a minute" so many times, and then does what it was told to.
type rogue struct {
	how   string
	after int
	n     int
}

func newRogue(params map[string]string) (policy.Policy, error) {
	r := &rogue{how: params["how"], after: 1 << 30}
	for k, v := range params {
		switch k {
		case "how", "tag":
		case "after":
			n, err := strconv.Atoi(v)
			if err != nil {
				return nil, fmt.Errorf("after=%q: want a number", v)
			}
			r.after = n
		default:
			return nil, fmt.Errorf("no parameter %q", k)
		}
	}
	return r, nil
}

func (r *rogue) Describe() *policy.Description {
	d := &policy.Description{Name: "rogue"}
	switch r.how {
	case "nameless":
		d.Name = ""
	case "demanding":
		d.Modes = []string{"replicate"}
	case "hang-describe":
		select {}
	}
	return d
}

func (r *rogue) Decide(s *policy.Signals) (*policy.Decision, error) {
	good := policy.At(s.GetNowNs()+int64(time.Minute), int64(time.Minute), fmt.Sprintf("decision %d of pid %d", r.n, os.Getpid()))
	if r.n++; r.n <= r.after {
		return good, nil
	}
	switch r.how {
	case "hang":
		select {}
	case "slow":
		<-time.After(policy.Deadline * 3 / 2)
	case "late": // once
		if r.n == r.after+1 {
			<-time.After(policy.Deadline * 3 / 2)
		}
	case "nonsense":
		good.Reason = ""
	case "tlc":
		good.Mode = "tlc"
	case "huge":
		good.Reason = strings.Repeat("x", 2*policy.MaxMessageBytes)
	case "error":
		return nil, fmt.Errorf("out of ideas")
	case "panic":
		panic("out of ideas")
	case "exit":
		os.Exit(3)
	case "stop":
		_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
		select {} // the signal may take another thread first
	case "memory":
		var hog [][]byte
		for {
			b := make([]byte, 64<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			hog = append(hog, b)
			_ = hog
		}
	case "chatter":
		for range 40 {
			fmt.Fprint(os.Stderr, strings.Repeat("blah ", 1<<17))
		}
	case "files":
		for {
			if _, err := os.Open("/dev/null"); err != nil {
				return nil, err
			}
		}
	}
	return good, nil
}

// registry installs copies of this binary under these names.
func registry(t testing.TB, names ...string) *Registry {
	t.Helper()
	r := NewRegistry(filepath.Join(t.TempDir(), "policies"))
	if err := os.MkdirAll(r.Dir(), 0o755); err != nil {
		t.Fatal(err)
	}
	installed(t, r, names...)
	return r
}

// installed installs this program under names.
func installed(t testing.TB, r *Registry, names ...string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	links := t.TempDir()
	for _, name := range names {
		link := filepath.Join(links, name)
		if err := os.Symlink(self, link); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Install(link); err != nil {
			t.Fatal(err)
		}
	}
}

func signals(now int64) *policy.Signals {
	return &policy.Signals{NowNs: now, Vm: &policypb.VM{Name: "web", RamBytes: 1 << 30, UsedBytes: 1 << 29},
		ProtectedSinceNs: now,
		Capabilities:     &policypb.Capabilities{Modes: []string{"stop", "buffer", "cow"}, Engines: []string{"uffd"}, MinIntervalNs: 1e8, Keep: 4}}
}

func now() *policy.Signals { return signals(time.Now().UnixNano()) }

// watchdog fails a test that hangs instead of having it hang.
func within(t testing.TB, limit time.Duration, what string, f func()) {
	t.Helper()
	began := time.Now()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	ctx, cancel := context.WithTimeout(t.Context(), limit+time.Minute)
	defer cancel()
	select {
	case <-done:
	case <-ctx.Done():
		t.Fatalf("%s: nothing after %v", what, time.Since(began))
	}
	if took := time.Since(began); took > limit {
		t.Errorf("%s took %v, more than %v", what, took, limit)
	}
}
