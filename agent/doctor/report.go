package doctor

// Schema names the JSON form of Report.
const Schema = "ckagent.doctor/1"

// Status of a check or of the whole host.
type Status string

const (
	OK      Status = "ok"
	Limited Status = "limited" // works, with the restriction named
	Missing Status = "missing" // does not work
)

// Check is one thing looked at.
type Check struct {
	Group    string `json:"group"` // kernel, bpf, rights, qemu, tools, store
	Name     string `json:"name"`
	Status   Status `json:"status"`
	Required bool   `json:"required"` // protecting VMs depends on it
	Detail   string `json:"detail"`   // what was found
	Costs    string `json:"costs,omitempty"`
	Mend     string `json:"mend,omitempty"`
}

// Engine says what a VM with a kind of RAM would get.
type Engine struct {
	RAM    string   `json:"ram"`
	Engine string   `json:"engine"` // "uffd", or "none": only modes that copy while stopped
	Modes  []string `json:"modes"`  // empty: refused
	Reason string   `json:"reason"`
}

// StoreReport holds the store's figures.
type StoreReport struct {
	Path              string `json:"path"`
	Filesystem        string `json:"filesystem"`
	FreeBytes         uint64 `json:"free_bytes"`
	TotalBytes        uint64 `json:"total_bytes"`
	FsyncMedianNS     int64  `json:"fsync_median_ns"`
	FsyncMaxNS        int64  `json:"fsync_max_ns"`
	MeasuredDirectory string `json:"measured_directory"`
}

// Report is what doctor found.
type Report struct {
	Schema  string      `json:"schema"`
	Status  Status      `json:"status"` // of what is required; optional gaps do not count
	Kernel  string      `json:"kernel"`
	Arch    string      `json:"arch"`
	Checks  []Check     `json:"checks"`
	Engines []Engine    `json:"engines"`
	Store   StoreReport `json:"store"`
}

// Find is the check of that group and name, or nil.
func (r *Report) Find(group, name string) *Check {
	for i := range r.Checks {
		if r.Checks[i].Group == group && r.Checks[i].Name == name {
			return &r.Checks[i]
		}
	}
	return nil
}

// Gaps are the checks that are not ok.
func (r *Report) Gaps() []Check {
	var out []Check
	for _, c := range r.Checks {
		if c.Status != OK {
			out = append(out, c)
		}
	}
	return out
}

// overall is the worst status among the required checks.
func overall(checks []Check) Status {
	s := OK
	for _, c := range checks {
		if !c.Required {
			continue
		}
		if c.Status == Missing {
			return Missing
		}
		if c.Status == Limited {
			s = Limited
		}
	}
	return s
}
