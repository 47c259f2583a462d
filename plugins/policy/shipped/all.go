package shipped

import "github.com/ckagent/ckagent/plugins/policy"

// Default is the name of the policy a VM gets if nobody says otherwise.
const Default = "auto"

// All are the shipped policies by name.
var All = map[string]policy.New{
	"auto": NewAuto, "bandwidth": NewBandwidth, "cost-min": NewCostMin, "dirty-watermark": NewDirtyWatermark,
	"fixed": NewFixed, "gerofi": NewGerofi, "idle-slot": NewIdleSlot, "output-trigger": NewOutputTrigger,
	"overhead-cap": NewOverheadCap, "young-daly": NewYoungDaly,
}
