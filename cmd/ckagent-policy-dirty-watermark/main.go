// Command ckagent-policy-dirty-watermark is the policy `dirty-watermark` as a plugin; ckagent starts it.
package main

import (
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

func main() { policy.Serve(shipped.NewDirtyWatermark) }
