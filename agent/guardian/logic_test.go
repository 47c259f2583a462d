package guardian

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

func TestWatch(t *testing.T) {
	const ms = int64(time.Millisecond)
	l := limits{agent: 500 * time.Millisecond, server: 300 * time.Millisecond}
	now := 1000 * ms
	base := observation{now: now, engaged: true, agentBeat: now - 10*ms, serverBeat: now - 10*ms, ownLastRun: now - 20*ms}
	for _, c := range []struct {
		name string
		set  func(o *observation)
		want order
	}{
		{"all well", func(o *observation) {}, goOn},
		{"QEMU ended, agent too", func(o *observation) { o.qemuDead, o.agentDead = true, true }, exitNow},
		{"asked to", func(o *observation) { o.quit = true }, exitNow},
		{"asked to, but the VM is stopped", func(o *observation) { o.quit, o.stopped, o.left = true, true, true }, takeOver},
		{"agent ended in order and was reaped", func(o *observation) { o.quit, o.agentDead = true, true }, exitNow},
		{"agent dead", func(o *observation) { o.agentDead = true }, takeOver},
		{"agent dead, idle", func(o *observation) { o.agentDead, o.engaged = true, false }, tidy},
		{"agent dead, not engaged but stopped", func(o *observation) { o.agentDead, o.engaged, o.stopped = true, false, true }, takeOver},
		{"agent dead, not engaged but SIGSTOP", func(o *observation) { o.agentDead, o.engaged, o.sigStopped = true, false, true }, takeOver},
		{"agent silent", func(o *observation) { o.agentBeat = now - 501*ms }, takeOver},
		{"agent just not silent", func(o *observation) { o.agentBeat = now - 500*ms }, goOn},
		{"agent silent, idle", func(o *observation) { o.agentBeat, o.engaged = 0, false }, goOn},
		{"we were away as well", func(o *observation) { o.agentBeat, o.ownLastRun = now-900*ms, now-800*ms }, goOn},
		{"first look", func(o *observation) { o.agentBeat, o.ownLastRun = now-900*ms, 0 }, takeOver},
		{"server silent", func(o *observation) { o.serverBeat = now - 301*ms }, killServer},
		{"server not up yet", func(o *observation) { o.serverBeat = 0 }, goOn},
		{"server gone", func(o *observation) { o.serverBeat, o.serverDead = now-900*ms, true }, goOn},
		{"both silent", func(o *observation) { o.serverBeat, o.agentBeat = 0, 0 }, takeOver},
	} {
		o := base
		c.set(&o)
		if got, _ := watch(o, l); got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestControl(t *testing.T) {
	c, f, err := CreateControl()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer c.Close()
	other, err := OpenControl(f)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	c.BeatAgent()
	c.Stopped.Store(1)
	if other.Stopped.Load() != 1 || other.AgentBeatNS.Load() == 0 || Now() < other.AgentBeatNS.Load() {
		t.Error("the pages differ")
	}
	wrong, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer wrong.Close()
	if _, err := OpenControl(wrong); err == nil {
		t.Error("an empty file was taken")
	}
	wrong.Truncate(controlBytes)
	if _, err := OpenControl(wrong); err == nil {
		t.Error("a page of zeros was taken")
	}
}

// TestResumeVM: `cont` goes only to a VM that is paused.
func TestResumeVM(t *testing.T) {
	for status, want := range map[string]bool{"paused": true, "save-vm": true, "running": false, "inmigrate": false,
		"postmigrate": false, "io-error": false, "shutdown": false, "internal-error": false, "prelaunch": false} {
		f := &fakeMonitor{status: status}
		before, resumed, err := resumeVM(context.Background(), f)
		if err != nil || before != status || resumed != want || f.continued != want {
			t.Errorf("%s: resumed %v, cont sent %v, %v", status, resumed, f.continued, err)
		}
	}
}

type fakeMonitor struct {
	status    string
	continued bool
}

func (f *fakeMonitor) Execute(_ context.Context, command string, _, out any) error {
	switch command {
	case "query-status":
		return json.Unmarshal([]byte(fmt.Sprintf(`{"status":%q,"running":%v}`, f.status, f.status == "running")), out)
	case "cont":
		f.continued = true
		return nil
	}
	return fmt.Errorf("unexpected %s", command)
}

// TestMonitorReplies: events, replies to others and long ones are skipped; pretty
// ones understood; errors come back.
func TestMonitorReplies(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	replies := []string{
		`{"event":"STOP","timestamp":{}}` + "\n" + `{"return":{"big":"` + strings.Repeat("x", 200<<10) + `"},"id":7}` + "\n" +
			`{"return":{"status":"paused"},"id":"ckagent-guardian-1"}` + "\n",
		"{\n    \"return\": {\n        \"status\": \"running\"\n    },\n    \"id\": \"ckagent-guardian-2\"\n}\n",
		`{"id":"ckagent-guardian-3","error":{"class":"GenericError","desc":"no"}}` + "\n",
	}
	go func() {
		in := bufio.NewReader(theirs)
		for _, r := range replies {
			if _, err := in.ReadString('\n'); err != nil {
				return
			}
			theirs.Write([]byte(r))
		}
	}()
	m := &monitor{conn: ours, r: bufio.NewReader(ours)}
	var st struct{ Status string }
	if err := m.Execute(context.Background(), "query-status", nil, &st); err != nil || st.Status != "paused" {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := m.Execute(context.Background(), "query-status", nil, &st); err != nil || st.Status != "running" {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := m.Execute(context.Background(), "cont", nil, nil); err == nil || !strings.Contains(err.Error(), "GenericError: no") {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := m.Execute(ctx, "cont", nil, nil); err == nil {
		t.Fatal("a silent monitor answered")
	}
}

func TestRemoveStale(t *testing.T) {
	dir := t.TempDir()
	self, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	recycled := identity{self.PID, self.StartTicks + 1}
	for _, name := range []string{statePath(dir, self) + stateSuffix, statePath(dir, recycled) + controlSuffix,
		dir + "/4194303-1.report.json", dir + "/notes"} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	removeStale(dir)
	list, _ := os.ReadDir(dir)
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	if len(names) != 2 || !exists(statePath(dir, self)+stateSuffix) || !exists(dir+"/notes") {
		t.Errorf("left: %v", names)
	}
}

func FuzzDecodeState(f *testing.F) {
	good, _ := json.Marshal(state{Schema: stateSchema, QEMU: identity{5, 6}, Guardian: identity{7, 8}})
	f.Add(good)
	f.Add([]byte(`{"schema":"ckagent.guardian-state/1","qemu":{"pid":5},"agent":{"pid":1}}`))
	f.Add([]byte(`{"schema":"ckagent.guardian-state/2"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeState(b)
		if err != nil {
			return
		}
		for _, id := range []identity{s.Agent, s.Guardian, s.Server} {
			if id.PID == 1 || id.PID < 0 {
				t.Errorf("would signal pid %d", id.PID)
			}
		}
		if s.Schema != stateSchema || s.QEMU.PID <= 0 {
			t.Errorf("accepted %+v", s)
		}
	})
}
