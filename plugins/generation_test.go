package plugins

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/plugins/policy"
)

func aCertificate() string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return base64.RawStdEncoding.EncodeToString(der)
}

// leftovers are the processes that run a program of the registry, and directories of
// sockets.
func leftovers(t testing.TB, r *Registry, temp string) (left []string) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		if exe, err := os.Readlink(p); err == nil && strings.HasPrefix(exe, r.Dir()) {
			left = append(left, p+" "+exe)
		}
	}
	dirs, err := filepath.Glob(filepath.Join(temp, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return append(left, dirs...)
}

// shortDir is a temporary directory whose path leaves room for a socket's.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "p-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestProgramsThatDoNotServe: each is told apart, in time, and nothing of it is left.
func TestProgramsThatDoNotServe(t *testing.T) {
	names := []string{"mute", "noise", "endless", "quits", "old", "naked", "stranger", "network", "frozen", "orphans"}
	r := registry(t, append(names, "rogue")...)
	temp := shortDir(t)
	h := &Host{StartTimeout: 3 * time.Second, TempDir: temp}
	rogue, err := r.Lookup("rogue")
	if err != nil {
		t.Fatal(err)
	}
	t.Run("programs", func(t *testing.T) { // at once: some are waited for as long as they may take
		for name, says := range map[string]string{
			"mute": "no answer in time", "noise": "Unrecognized remote plugin message: hello, world", "endless": "",
			"quits": "no such library", "old": "version", "naked": "no certificate", "stranger": "cert", "network": "unix socket",
			"frozen": "no answer in time", "orphans": "orphan",
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				p, err := r.Lookup(name)
				if err != nil {
					t.Fatal(err)
				}
				within(t, 5*time.Second, name, func() {
					g, err := h.Start(t.Context(), p, nil)
					if err == nil {
						t.Errorf("%s started", name)
						g.End()
						return
					}
					if !errors.Is(err, ErrStart) || !strings.Contains(err.Error(), says) {
						t.Errorf("%s: %v, want %q", name, err, says)
					}
					if _, pid, ok := strings.Cut(err.Error(), "orphan "); ok {
						n, _ := strconv.Atoi(strings.Fields(pid)[0])
						_ = unix.Kill(n, unix.SIGKILL)
					}
				})
			})
		}
		for how, want := range map[string]error{"nameless": ErrAnswer, "hang-describe": ErrSlow} {
			t.Run(how, func(t *testing.T) {
				t.Parallel()
				within(t, 5*time.Second, how, func() {
					if _, err := h.Start(t.Context(), rogue, map[string]string{"how": how}); !errors.Is(err, want) {
						t.Errorf("%s: %v, want %v", how, err, want)
					}
				})
			})
		}
	})
	if _, err := h.Start(t.Context(), rogue, map[string]string{"what": "1"}); !errors.Is(err, ErrParams) || !strings.Contains(err.Error(), `"what"`) {
		t.Errorf("an unknown parameter: %v", err)
	}
	wrong := rogue
	wrong.SHA256 = strings.Repeat("0", 64)
	if _, err := h.Start(t.Context(), wrong, nil); !errors.Is(err, ErrChecksum) {
		t.Errorf("a wrong checksum: %v", err)
	}
	if left := leftovers(t, r, temp); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestWhatAProgramGets: no environment, no input, limits, a group of its own, and the
// host's confinement.
func TestWhatAProgramGets(t *testing.T) {
	t.Setenv("CKAGENT_SECRET", "s3cret")
	r := registry(t, "rogue")
	p, err := r.Lookup("rogue")
	if err != nil {
		t.Fatal(err)
	}
	confined, released := 0, 0
	h := &Host{TempDir: shortDir(t), Confine: func(pid int) func() { confined = pid; return func() { released = pid } }}
	g, err := h.Start(t.Context(), p, nil)
	if err != nil {
		t.Fatal(err)
	}
	pid := g.PID()
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil || strings.Contains(string(env), "SECRET") || strings.Contains(string(env), "HOME=") {
		t.Errorf("environment %q, %v", env, err)
	}
	if in, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/0", pid)); err != nil || in != "/dev/null" {
		t.Errorf("input %q, %v", in, err)
	}
	if pgid, err := unix.Getpgid(pid); err != nil || pgid != pid {
		t.Errorf("group %d of %d, %v", pgid, pid, err)
	}
	var lim unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_DATA, nil, &lim); err != nil || lim.Max != DefaultLimits.DataBytes {
		t.Errorf("memory limit %v, %v", lim, err)
	}
	d, err := g.Decide(t.Context(), now())
	if err != nil || !strings.Contains(d.GetReason(), fmt.Sprint(pid)) {
		t.Errorf("%v, %v", d, err)
	}
	g.End()
	if confined != pid || released != pid {
		t.Errorf("confined %d, released %d, want %d", confined, released, pid)
	}
	if left := leftovers(t, r, h.TempDir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestProgramsThatFailLater: what it did is in the error, in time.
func TestProgramsThatFailLater(t *testing.T) {
	r := registry(t, "rogue")
	p, err := r.Lookup("rogue")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var said []string
	h := &Host{TempDir: shortDir(t), Line: func(_, text string) { mu.Lock(); said = append(said, text); mu.Unlock() }}
	for how, want := range map[string]error{"hang": ErrSlow, "slow": ErrSlow, "stop": ErrSlow, "nonsense": policy.ErrInvalid, "tlc": policy.ErrUnsupported,
		"huge": ErrFlood, "error": ErrDeclines, "panic": ErrEnded, "exit": ErrEnded, "files": ErrDeclines} {
		g, err := h.Start(t.Context(), p, map[string]string{"how": how, "after": "1"})
		if err != nil {
			t.Fatal(how, err)
		}
		if _, err := g.Decide(t.Context(), now()); err != nil {
			t.Errorf("%s, at first: %v", how, err)
		}
		within(t, policy.Deadline+time.Second, how, func() {
			if _, err := g.Decide(t.Context(), now()); !errors.Is(err, want) {
				t.Errorf("%s: %v, want %v", how, err, want)
			}
		})
		within(t, endGrace+2*time.Second, "end of "+how, g.End)
	}
	for how, limit := range map[string]time.Duration{"memory": 20 * time.Second, "chatter": 20 * time.Second} {
		g, err := h.Start(t.Context(), p, map[string]string{"how": how, "after": "0"})
		if err != nil {
			t.Fatal(how, err)
		}
		if _, err := g.Decide(t.Context(), now()); err == nil {
			t.Errorf("%s decides", how)
		}
		select {
		case <-g.Ended():
		case <-time.After(limit):
			t.Errorf("%s lives", how)
		}
		g.End()
	}
	if left := leftovers(t, r, h.TempDir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(said) == 0 {
		t.Error("nothing of what the programs wrote arrived")
	}
}
