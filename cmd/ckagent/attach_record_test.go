package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
	"github.com/ckagent/ckagent/plugins/policy/replay"
)

// TestRecordAsking: what is written can be replayed, begins with the first checkpoint, and
// replaces no file.
func TestRecordAsking(t *testing.T) {
	path := filepath.Join(t.TempDir(), "trace.gz")
	r, err := recordAsking(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*policy.Signals{{NowNs: 1}, {NowNs: 2, LastSuccessNs: 2}, {NowNs: 2, LastSuccessNs: 2}, {NowNs: 3, LastSuccessNs: 2}} {
		r.asked(s)
	}
	if err := r.close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	trace, err := replay.Read(f)
	if err != nil || len(trace) != 2 || trace[0].GetNowNs() != 2 || trace[1].GetNowNs() != 3 {
		t.Errorf("%v, %v", trace, err)
	}
	if _, err := recordAsking(path); !problem.Is(err, problem.Failed) {
		t.Errorf("a file was written over: %v", err)
	}
}

// TestRecordingThatFails: the first failure is told at the end, and not before.
func TestRecordingThatFails(t *testing.T) {
	f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	r := &asking{path: "/dev/full", t: newTraceWriter(f, false)}
	for at := range int64(200) {
		r.asked(&policy.Signals{NowNs: at + 1, LastSuccessNs: 1, Vm: &policypb.VM{Name: "a name that fills the writer's buffer sooner or later"}})
	}
	if err := r.close(); !problem.Is(err, problem.Failed) {
		t.Errorf("%v", err)
	}
}
