package daemon

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestConfiguration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.toml")
	load := func(text string) (Config, error) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return Load(path)
	}
	c, err := load("")
	if err != nil || !reflect.DeepEqual(c, Standard()) {
		t.Errorf("an empty file is not the defaults: %v %+v", err, c)
	}
	if _, err := Load(path + ".none"); !problem.Is(err, problem.NotFound) {
		t.Errorf("%v", err)
	}
	c, err = load("socket = '/a'\n[limits]\ncheckpoints = 3\n[rehearsal]\nevery = '2h'\n")
	if err != nil || c.Socket != "/a" || c.Limits.Checkpoints != 3 || time.Duration(c.Rehearsal.Every) != 2*time.Hour || c.Defaults.KeepLast != agent.DefaultKeep {
		t.Errorf("%v %+v", err, c)
	}
	for text, word := range map[string]string{
		"sokcet = '/a'":                                       "sokcet",
		"[limits]\nchekpoints = 1":                            "limits.chekpoints",
		"[unknown]":                                           "unknown",
		"socket = 'relative'":                                 "absolute",
		"read_socket = '/run/ckagent/daemon.sock'":            "same",
		"[limits]\ncheckpoints = 0":                           "checkpoints",
		"[limits]\nstore_bytes_per_second = 1":                "store_bytes_per_second",
		"[limits]\nstore_bytes_per_second = -1":               "store_bytes_per_second",
		"[limits]\nmemory_bytes = 1000":                       "memory_bytes",
		"[defaults]\ninterval = '1ms'":                        "interval",
		"[defaults]\ninterval = 15":                           "interval",
		"[defaults]\non_death = 'revive'":                     "on_death",
		"[defaults]\nkeep_last = -1":                          "keep_last",
		"[rehearsal]\nevery = '1s'":                           "rehearsal.every",
		"[signals]\ndirty_every = '1s'":                       "dirty_every",
		"[tls]\nlisten = '127.0.0.1:1'":                       "client_ca",
		"[tls]\ncert = '/x'":                                  "listen",
		"[tls]\nlisten='x'\ncert='a'\nkey='a'\nclient_ca='a'": "tls.listen",
	} {
		if _, err := load(text); !problem.Is(err, problem.Usage) || !strings.Contains(err.Error(), word) {
			t.Errorf("%q: %v, want a usage error about %q", text, err, word)
		}
	}
}

// Every key is in the document, and every key of the document exists.
func TestConfigurationIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/daemon.md")
	if err != nil {
		t.Fatal(err)
	}
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			key := prefix + f.Tag.Get("toml")
			if f.Type.Kind() == reflect.Struct {
				walk(key+".", f.Type)
			} else if !strings.Contains(string(text), "`"+key+"`") {
				t.Errorf("docs/daemon.md does not describe %s", key)
			}
		}
	}
	walk("", reflect.TypeFor[Config]())
}

func TestState(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenState(dir); !problem.Is(err, problem.Busy) {
		t.Errorf("two have it: %v", err)
	}
	a := Record{Schema: recordSchema, Name: "a/b c", PID: 7, StartTicks: 9, BootID: "x", Since: time.Now().UTC().Round(0), Proven: true,
		Spec: &apipb.Spec{Policy: "auto", Params: map[string]string{"k": "v"}}, Ending: &apipb.Ending{How: "crashed"}, Rehearsal: &apipb.Rehearsal{Ok: true}}
	b := Record{Schema: recordSchema, Name: "b", PID: 8, Spec: &apipb.Spec{}, Since: a.Since}
	dotted := Record{Schema: recordSchema, Name: ".new-1", PID: 9, Spec: &apipb.Spec{}, Since: a.Since}
	bytes := Record{Schema: recordSchema, Name: "c/d", PID: 10, Spec: &apipb.Spec{}, Since: a.Since, Ending: &apipb.Ending{How: "crashed", Detail: "of \xff"}}
	long := Record{Schema: recordSchema, Name: strings.Repeat("ü", 127), PID: 11, Spec: &apipb.Spec{}, Since: a.Since}
	alike := Record{Schema: recordSchema, Name: long.Name + "1", PID: 12, Spec: &apipb.Spec{}, Since: a.Since}
	for _, r := range []Record{a, b, dotted, bytes, long, alike} {
		if err := s.Save(r); err != nil {
			t.Fatal(err)
		}
	}
	// What a killed writer left, and what a disk made of a file, cost no other VM.
	for name, text := range map[string]string{".new-1": "{", "c.json": `{"schema":"ckagent.protected/1","vm":"c"`, "d.json": "{}"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = OpenState(dir); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := os.Stat(filepath.Join(dir, ".new-1")); !os.IsNotExist(err) {
		t.Errorf("what a killed writer left is there: %v", err)
	}
	list, err := s.Read()
	if !problem.Is(err, problem.Integrity) || !strings.Contains(err.Error(), "c.json") || !strings.Contains(err.Error(), "d.json") {
		t.Errorf("damage is not told: %v", err)
	}
	bytes.Ending = &apipb.Ending{How: "crashed", Detail: "of ?"}
	slices.SortFunc(list, func(x, y Record) int { return x.PID - y.PID })
	if diff := cmp.Diff([]Record{a, b, dotted, bytes, long, alike}, list, protocmp.Transform()); diff != "" {
		t.Errorf("%s", diff)
	}
	for _, name := range []string{"a/b c", alike.Name} {
		if err := s.Remove(name); err != nil {
			t.Error(err)
		}
	}
	if err := s.Remove("a/b c"); err != nil {
		t.Errorf("twice: %v", err)
	}
	if (Record{PID: os.Getpid(), StartTicks: 1, BootID: BootID()}).Alive() {
		t.Error("another process of this pid is taken for the VM")
	}
}

// Between two turns of one VM every other that waits has one.
func TestTurnsAreFair(t *testing.T) {
	const vms, rounds = 8, 40
	l := newLimits(Limits{Checkpoints: 2})
	var p agent.Protection
	l.apply(&p)
	var mu sync.Mutex
	var order []int
	under, most := 0, 0
	var wg sync.WaitGroup
	for vm := range vms {
		wg.Go(func() {
			for range rounds {
				leave, err := p.Enter(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				order = append(order, vm)
				under++
				most = max(most, under)
				mu.Unlock()
				mu.Lock()
				under--
				mu.Unlock()
				leave()
			}
		})
	}
	wg.Wait()
	if most > 2 || len(order) != vms*rounds {
		t.Errorf("%d at a time, %d turns", most, len(order))
	}
	ctx, cancel := context.WithCancel(t.Context())
	a, _ := p.Enter(ctx)
	b, _ := p.Enter(ctx)
	cancel()
	if _, err := p.Enter(ctx); err == nil {
		t.Error("a third turn")
	}
	a()
	b()
	if leave, err := p.Enter(t.Context()); err != nil {
		t.Error(err)
	} else {
		leave()
	}
}

func TestBandwidth(t *testing.T) {
	b := &bandwidth{perSecond: 1 << 20}
	now := time.Unix(1000, 0)
	var last time.Time
	for range 64 { // 4 MiB at 1 MiB/s
		last = b.reserve(now, 64<<10)
	}
	if took := last.Sub(now); took < 3500*time.Millisecond || took > 4*time.Second {
		t.Errorf("4 MiB at 1 MiB/s: the last piece after %v", took)
	}
	// What waited makes up for it a little, and not for ever.
	later := now.Add(time.Hour)
	if at := b.reserve(later, 1<<20); at.After(later) || later.Sub(at) > burst {
		t.Errorf("after an hour: %v", at.Sub(later))
	}
	if at := b.reserve(later, 1); at.Before(later) {
		t.Errorf("an idle hour is made up for at once: %v", at.Sub(later))
	}
}

func TestMemoryIsShared(t *testing.T) {
	l := newLimits(Limits{Checkpoints: 4, Memory: 1 << 30})
	var p agent.Protection
	p.Capture.BufferBytes = 10 << 30
	l.apply(&p)
	share := uint64(256 << 20)
	if o := p.Capture; o.ArenaBytes+o.DiskMemoryBytes > share || o.BufferBytes != share || o.ArenaBytes != 96<<20 {
		t.Errorf("%+v", o)
	}
}
