package disk

import (
	"context"
	"fmt"
	"strings"
)

// Monitor is what this package needs of a QMP connection.
type Monitor interface {
	Execute(ctx context.Context, command string, args, out any) error
}

// Drive is a block backend with what is in it, as QEMU lists it.
type Drive struct {
	Device   string // name that -drive gave it, "" with -blockdev
	QOMPath  string // of the device that uses it, "" when none does
	Root     string // top node of the medium, "" when empty
	ReadOnly bool
}

// Bitmap is a dirty bitmap of a node.
type Bitmap struct {
	Name         string `json:"name"`
	Recording    bool   `json:"recording"`
	Busy         bool   `json:"busy"`
	Persistent   bool   `json:"persistent"`
	Inconsistent bool   `json:"inconsistent"`
	Granularity  uint64 `json:"granularity"` // bytes
	Count        uint64 `json:"count"`       // dirty bytes
}

// Node is a block node.
type Node struct {
	Name      string   `json:"node-name"`
	Driver    string   `json:"drv"`
	File      string   `json:"file"`
	ReadOnly  bool     `json:"ro"`
	Encrypted bool     `json:"encrypted"`
	Bitmaps   []Bitmap `json:"dirty-bitmaps"`
	Image     struct {
		Filename    string `json:"filename"`
		VirtualSize uint64 `json:"virtual-size"`
		ActualSize  uint64 `json:"actual-size"`
		Snapshots   []struct {
			Name string `json:"name"`
		} `json:"snapshots"`
	} `json:"image"`

	children []edge
}

// Path is what QEMU calls the image.
func (n *Node) Path() string {
	if f := n.Image.Filename; f != "" && !strings.HasPrefix(f, "json:") {
		return f
	}
	return n.File
}

type edge struct{ name, child string }

// Child is the node that a node uses under a name ("file", "backing", "target").
func (n *Node) Child(name string) string {
	for _, e := range n.children {
		if e.name == name {
			return e.child
		}
	}
	return ""
}

// Export is what makes a node available outside of QEMU.
type Export struct {
	ID   string `json:"id"`
	Type string `json:"type"`
	Node string `json:"node-name"`
}

// Job is a background job.
type Job struct {
	ID       string `json:"id"`
	Type     string `json:"type"`
	Status   string `json:"status"`
	Error    string `json:"error"`
	Progress uint64 `json:"current-progress"`
	Total    uint64 `json:"total-progress"`
}

// Over reports whether the job does nothing any more.
func (j *Job) Over() bool { return j.Status == "concluded" || j.Status == "null" }

// Graph is the block layer at one look.
type Graph struct {
	Drives  []Drive
	Nodes   map[string]*Node
	Jobs    []Job
	Exports []Export
	// users of a node: block backends and jobs by name
	users map[string][]string
}

// Read looks at the block graph.
func Read(ctx context.Context, q Monitor) (*Graph, error) {
	g := &Graph{Nodes: map[string]*Node{}, users: map[string][]string{}}
	var infos []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted *struct {
			Node string `json:"node-name"`
			RO   bool   `json:"ro"`
		} `json:"inserted"`
	}
	if err := q.Execute(ctx, "query-block", nil, &infos); err != nil {
		return nil, fmt.Errorf("query-block: %w", err)
	}
	for _, b := range infos {
		d := Drive{Device: b.Device, QOMPath: b.QDev}
		if d.QOMPath != "" && d.QOMPath[0] != '/' {
			d.QOMPath = "/machine/peripheral/" + d.QOMPath
		}
		if b.Inserted != nil {
			d.Root, d.ReadOnly = b.Inserted.Node, b.Inserted.RO
		}
		g.Drives = append(g.Drives, d)
	}
	var nodes []Node
	if err := q.Execute(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return nil, fmt.Errorf("query-named-block-nodes: %w", err)
	}
	for i := range nodes {
		g.Nodes[nodes[i].Name] = &nodes[i]
	}
	if err := g.readEdges(ctx, q); err != nil {
		return nil, err
	}
	var err error
	if g.Jobs, err = ReadJobs(ctx, q); err != nil {
		return nil, err
	}
	if err := q.Execute(ctx, "query-block-exports", nil, &g.Exports); err != nil {
		return nil, fmt.Errorf("query-block-exports: %w", err)
	}
	return g, nil
}

// readEdges asks who uses whom. The command is meant for debugging, but the only
// one that tells, and it has been the same since QEMU 4.0.
func (g *Graph) readEdges(ctx context.Context, q Monitor) error {
	var raw struct {
		Nodes []struct {
			ID   uint64 `json:"id"`
			Type string `json:"type"`
			Name string `json:"name"`
		} `json:"nodes"`
		Edges []struct {
			Parent uint64 `json:"parent"`
			Child  uint64 `json:"child"`
			Name   string `json:"name"`
		} `json:"edges"`
	}
	if err := q.Execute(ctx, "x-debug-query-block-graph", nil, &raw); err != nil {
		return fmt.Errorf("x-debug-query-block-graph: %w", err)
	}
	type ref struct{ kind, name string }
	byID := make(map[uint64]ref, len(raw.Nodes))
	for _, n := range raw.Nodes {
		byID[n.ID] = ref{n.Type, n.Name}
	}
	for _, e := range raw.Edges {
		parent, child := byID[e.Parent], byID[e.Child]
		if parent.kind != "block-driver" {
			g.users[child.name] = append(g.users[child.name], parent.name)
		} else if n := g.Nodes[parent.name]; n != nil {
			n.children = append(n.children, edge{e.Name, child.name})
		}
	}
	return nil
}

// ReadJobs lists the background jobs.
func ReadJobs(ctx context.Context, q Monitor) ([]Job, error) {
	var jobs []Job
	if err := q.Execute(ctx, "query-jobs", nil, &jobs); err != nil {
		return nil, fmt.Errorf("query-jobs: %w", err)
	}
	return jobs, nil
}

// Below lists a node and everything under it, each once, top first.
func (g *Graph) Below(name string) []*Node {
	var out []*Node
	seen := map[string]bool{}
	var walk func(string)
	walk = func(name string) {
		n := g.Nodes[name]
		if n == nil || seen[name] {
			return
		}
		seen[name] = true
		out = append(out, n)
		for _, e := range n.children {
			walk(e.child)
		}
	}
	walk(name)
	return out
}

// Leftovers reports whether a node, job or descriptor of a checkpoint is in the
// graph; bitmaps are meant to stay and do not count.
func (g *Graph) Leftovers() bool {
	for name := range g.Nodes {
		if Ours(name) {
			return true
		}
	}
	for _, j := range g.Jobs {
		if Ours(j.ID) {
			return true
		}
	}
	return false
}
