package disk

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// transcript answers with what a QEMU once said; what it was told is noted.
type transcript struct {
	replies map[string]json.RawMessage
	told    []string
}

func (q *transcript) Execute(_ context.Context, command string, args, out any) error {
	text, err := json.Marshal(args)
	if err != nil {
		return err
	}
	q.told = append(q.told, command+" "+string(text))
	reply, ok := q.replies[command]
	if out == nil {
		return nil
	}
	if !ok {
		return errors.New("not in the transcript: " + command)
	}
	return json.Unmarshal(reply, out)
}

func recorded(t testing.TB, name string) *transcript {
	t.Helper()
	raw, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	q := &transcript{}
	if err := json.Unmarshal(raw, &q.replies); err != nil {
		t.Fatal(err)
	}
	return q
}

// TestRecordedGraphs: a machine with a disk on a backing file that somebody mirrors,
// one behind a throttle filter with a bitmap of ours, an encrypted one and a CD.
func TestRecordedGraphs(t *testing.T) {
	for _, name := range []string{"graph-7.2.json", "graph-10.0.json"} {
		t.Run(name, func(t *testing.T) {
			g, err := Read(t.Context(), recorded(t, name))
			if err != nil {
				t.Fatal(err)
			}
			if len(g.Drives) < 4 || g.Leftovers() {
				t.Errorf("drives %+v", g.Drives)
			}
			sources, refused := g.Sources()
			var codes []string
			for _, r := range refused {
				codes = append(codes, r.Code)
			}
			if !slices.Equal(codes, []string{"job-active"}) || refused[0].Object != "theirs" {
				t.Errorf("refused %+v", refused)
			}
			if len(sources) != 2 {
				t.Fatalf("sources %+v", sources)
			}
			e := sources[0]
			if e.File == "" || g.Nodes[e.File].Driver != "file" || e.Tracked() != e.File || e.Path != "e.qcow2" || e.Storage != "file" {
				t.Errorf("encrypted %+v", e)
			}
			s := sources[1]
			if s.File != "" || s.Tracked() != "th" {
				t.Errorf("source %+v", s)
			}
			if s.Root != "th" || s.Format != "qcow2" || s.Path != "b.qcow2" || s.Bytes != 4<<20 || s.Device != "/machine/peripheral/s1" {
				t.Errorf("source %+v", s)
			}
			own := s.Own()
			if len(own) != 1 || !own[0].Recording || own[0].Granularity != 65536 {
				t.Errorf("bitmaps %+v", own)
			}
			if id, ok := BitmapOwner(own[0].Name); !ok || id != "20261122T030717767-9110e631" {
				t.Errorf("bitmap of %q", id)
			}
			var below []string
			for _, n := range g.Below("th") {
				below = append(below, n.Driver)
			}
			if !slices.Equal(below, []string{"throttle", "qcow2", "file", "raw", "file"}) {
				t.Errorf("below the filter: %q", below)
			}
		})
	}
}

// TestSweepOrder: users before what they use, the device in between, and nobody
// else's things.
func TestSweepOrder(t *testing.T) {
	q := recorded(t, "graph-7.2.json")
	text := string(q.replies["query-block"])
	// The filter sits on the throttle node, as in a checkpoint.
	q.replies["query-block"] = json.RawMessage(strings.Replace(text, `"node-name": "th"`, `"node-name": "ckagent-cbw-0"`, 1))
	var nodes []map[string]any
	if err := json.Unmarshal(q.replies["query-named-block-nodes"], &nodes); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"ckagent-target-0", "ckagent-snap-0", "ckagent-fleece-0", "ckagent-cbw-0"} {
		nodes = append(nodes, map[string]any{"node-name": n, "drv": "x"})
	}
	var graph struct {
		Nodes []map[string]any `json:"nodes"`
		Edges []map[string]any `json:"edges"`
	}
	if err := json.Unmarshal(q.replies["x-debug-query-block-graph"], &graph); err != nil {
		t.Fatal(err)
	}
	th := float64(0)
	for _, n := range graph.Nodes {
		if n["name"] == "th" {
			th = n["id"].(float64)
		}
	}
	graph.Nodes = append(graph.Nodes, map[string]any{"id": 9001, "type": "block-driver", "name": "ckagent-cbw-0"})
	graph.Edges = append(graph.Edges, map[string]any{"parent": 9001, "child": th, "name": "file"})
	var err error
	if q.replies["query-named-block-nodes"], err = json.Marshal(nodes); err != nil {
		t.Fatal(err)
	}
	if q.replies["x-debug-query-block-graph"], err = json.Marshal(graph); err != nil {
		t.Fatal(err)
	}
	q.replies["query-fdsets"] = json.RawMessage(`[{"fdset-id":3,"fds":[{"fd":9,"opaque":"ckagent-disk"}]},{"fdset-id":4,"fds":[{"fd":9,"opaque":"other"}]}]`)
	if _, err := Sweep(t.Context(), q, true); err != nil {
		t.Fatal(err)
	}
	var acts []string
	for _, c := range q.told {
		if !strings.HasPrefix(c, "query-") && !strings.HasPrefix(c, "x-debug") {
			acts = append(acts, c)
		}
	}
	want := []string{
		`blockdev-del {"node-name":"ckagent-snap-0"}`,
		`qom-set {"path":"/machine/peripheral/s1","property":"drive","value":"th"}`,
		`blockdev-del {"node-name":"ckagent-cbw-0"}`,
		`blockdev-del {"node-name":"ckagent-fleece-0"}`,
		`blockdev-del {"node-name":"ckagent-target-0"}`,
		`block-dirty-bitmap-remove {"name":"ckagent-bitmap-20261122T030717767-9110e631","node":"th"}`,
		`remove-fd {"fdset-id":3}`,
	}
	if !slices.Equal(acts, want) {
		t.Errorf("sweep did\n%s\nwant\n%s", strings.Join(acts, "\n"), strings.Join(want, "\n"))
	}
}

func TestSweepEndsJobs(t *testing.T) {
	q := recorded(t, "graph-7.2.json")
	q.replies["query-jobs"] = json.RawMessage(`[{"id":"theirs","type":"mirror","status":"running"},{"id":"ckagent-copy-0","type":"backup","status":"running"}]`)
	q.replies["query-fdsets"] = json.RawMessage(`[]`)
	ctx, cancel := context.WithTimeout(t.Context(), 4*jobPoll)
	defer cancel()
	if _, err := Sweep(ctx, q, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a job that does not end: %v", err)
	}
	cancels := 0
	for _, c := range q.told {
		if strings.HasPrefix(c, "block-job-cancel") {
			cancels++
			if !strings.Contains(c, "ckagent-copy-0") {
				t.Errorf("cancelled %s", c)
			}
		}
		if strings.HasPrefix(c, "blockdev-del") || strings.HasPrefix(c, "qom-set") {
			t.Errorf("while its job runs: %s", c)
		}
	}
	if cancels != 1 {
		t.Errorf("cancelled %d times", cancels)
	}
}

// FuzzRead: whatever QEMU answers, no look at it fails but with an error, and no walk
// is endless.
func FuzzRead(f *testing.F) {
	for _, name := range []string{"graph-7.2.json", "graph-10.0.json"} {
		raw, err := os.ReadFile("testdata/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Add([]byte(`{"query-block":[{"inserted":{"node-name":"a"},"qdev":"x"}],"query-named-block-nodes":[{"node-name":"a","drv":"throttle"}],
		"x-debug-query-block-graph":{"nodes":[{"id":1,"type":"block-driver","name":"a"}],"edges":[{"parent":1,"child":1,"name":"file"}]},"query-jobs":[],"query-block-exports":[]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		q := &transcript{}
		if json.Unmarshal(raw, &q.replies) != nil {
			return
		}
		g, err := Read(t.Context(), q)
		if err != nil {
			return
		}
		g.Sources()
		g.Leftovers()
	})
}
