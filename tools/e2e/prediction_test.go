package e2e

import (
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/replay"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// predictionVariable asks for live runs of so long each, of a machine that has little else
// to do.
const predictionVariable = "CKAGENT_E2E_PREDICTION"

// predictedWithin is how far off a prediction may be.
const predictedWithin = 0.20

// learning is how many checkpoints of a run belong to no steady one: its policy learns
// from them what they take.
const learning = 3

// steady is what is predicted of a run, or seen of it.
type steady struct {
	checkpoints int
	interval    float64 // seconds between two
	bytes       float64 // of one
	overhead    float64 // share of the time, as policies reckon it
	loss        float64 // seconds, at a failure at any instant, on average
}

// seen sums up the checkpoints of a run.
func seen(list []*policy.Checkpoint) (s steady) {
	s.checkpoints = len(list)
	n := float64(len(list))
	span := time.Duration(list[len(list)-1].GetAtNs() - list[0].GetAtNs()).Seconds()
	s.interval = span / (n - 1)
	for i, c := range list {
		s.bytes += float64(c.GetStoredBytes()) / n
		s.overhead += shipped.Lost(c) / n / s.interval
		if i == 0 {
			continue
		}
		// From when the one before counted until this one does, a failure goes back to that.
		prev := list[i-1]
		from := time.Duration(prev.GetCommitNs()).Seconds()
		until := time.Duration(c.GetAtNs() - prev.GetAtNs() + c.GetCommitNs()).Seconds()
		s.loss += (until*until - from*from) / 2 / span
	}
	return s
}

// TestPrediction: from a recording of a VM that one policy protects, replay says what
// another one will do, and that is what it then does.
func TestPrediction(t *testing.T) {
	if os.Getenv(predictionVariable) == "" {
		vmtest.Skip(t, "prediction", "a measurement, which needs a machine that has little else to do: %s=60s asks for it", predictionVariable)
	}
	long, err := time.ParseDuration(os.Getenv(predictionVariable))
	if err != nil {
		t.Fatal(err)
	}
	x := newTool(t)
	dir := filepath.Dir(x.bin)
	policies := filepath.Join(dir, "policies")
	const mtbf = "10m"
	cases := []struct {
		policy string
		params []string
	}{
		{"auto", []string{"mtbf=" + mtbf, "shortest=100ms", "longest=1m"}},
		{"young-daly", []string{"mtbf=" + mtbf}},
		{"overhead-cap", []string{"first=2s", "shortest=200ms", "target=0.005"}},
		{"fixed", []string{"interval=3s"}},
	}
	for _, c := range cases {
		x.install(t, policies, c.policy)
	}
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 256, WSMiB: 64, Rate: 2000})
	v.WaitProgress(t, 200)
	live := func(t *testing.T, name string, long time.Duration, chosen []string) (path string) {
		t.Helper()
		path = filepath.Join(dir, "trace-"+name+".jsonl.gz")
		s := x.start(t, append([]string{"attach", itoa(v.PID()), "--foreground", "--record", path, "--store", x.store, "--keep-last", "2", "--full-every", "1",
			"--policy-dir", policies, "--json"}, chosen...)...)
		over := time.NewTimer(long)
		defer over.Stop()
		select {
		case <-over.C:
		case code := <-s.done:
			t.Fatalf("it ended with %d: %s", code, s.err)
		}
		s.signal(unix.SIGINT)
		if r := s.wait(t, time.Minute); r.code != exitCancelled {
			t.Fatalf("%s", r)
		}
		return path
	}
	for _, c := range cases {
		t.Run(c.policy, func(t *testing.T) {
			chosen := []string{"--policy", c.policy}
			for _, p := range c.params {
				chosen = append(chosen, "--param", p)
			}
			recording := live(t, c.policy+"-before", min(long, 30*time.Second), []string{"--policy", "fixed", "--param", "interval=1500ms"})
			want := x.predicted(t, append([]string{recording, "--policy-dir", policies, "--mtbf", mtbf, "--repeat", "20"}, chosen...))
			list := taken(recorded(t, live(t, c.policy, long, chosen)))
			if len(list) < learning+5 {
				t.Fatalf("only %d checkpoints", len(list))
			}
			got := seen(list[learning:])
			for _, f := range []struct {
				what, unit string
				want, got  float64
			}{{"interval", "s", want.interval, got.interval}, {"stored for each", "MiB", want.bytes / (1 << 20), got.bytes / (1 << 20)},
				{"overhead", "%", 100 * want.overhead, 100 * got.overhead}, {"lost at a failure", "s", want.loss, got.loss}} {
				off := f.want/f.got - 1
				t.Logf("%s: predicted %.4g %s, was %.4g (%+.1f %%), of %d checkpoints and %d", f.what, f.want, f.unit, f.got, 100*off, want.checkpoints, got.checkpoints)
				if !(math.Abs(off) <= predictedWithin) {
					t.Errorf("%s is not what was predicted", f.what)
				}
			}
		})
	}
}

// predicted is what replay says.
func (x *tool) predicted(t *testing.T, args []string) (s steady) {
	t.Helper()
	var said struct {
		Policies []struct {
			Bytes      uint64  `json:"stored_bytes"`
			Overhead   float64 `json:"overhead_share"`
			MeanLossNS int64   `json:"mean_loss_ns"`
			Taken      []struct {
				AtNS int64 `json:"at_ns"`
			}
		}
	}
	x.json(t, &said, append([]string{"policy", "replay", "--checkpoints"}, args...)...)
	p := said.Policies[0]
	n := len(p.Taken)
	if n < 2*learning {
		t.Fatalf("predicted: %+v", p)
	}
	return steady{n, time.Duration(p.Taken[n-1].AtNS-p.Taken[learning].AtNS).Seconds() / float64(n-1-learning), float64(p.Bytes) / float64(n), p.Overhead,
		time.Duration(p.MeanLossNS).Seconds()}
}

// recorded are the lines of a trace.
func recorded(t *testing.T, path string) []*policy.Signals {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	trace, err := replay.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	return trace
}

// taken are the checkpoints that the last line of a trace tells of.
func taken(trace []*policy.Signals) (list []*policy.Checkpoint) {
	for _, c := range trace[len(trace)-1].GetHistory() {
		if c.GetOk() {
			list = append(list, c)
		}
	}
	return list
}
