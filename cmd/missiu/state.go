package main

import (
	"os"
	"path/filepath"

	"github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/bump"
	"github.com/missiu/missiu/pkg/keysock"
)

func statePath(ifname string) string { return filepath.Join(keysock.Dir, ifname+".policies") }

// removeState removes the policies and sockets of an instance that is gone; it
// reports whether there were any.
func removeState(ifname string) bool {
	any := false
	for _, p := range []string{statePath(ifname), statePath(ifname) + ".new", keysock.Path(ifname), keysock.Path(ifname) + ".lock", nattPath(ifname), attach.Path(ifname, capture.Purpose), attach.Path(ifname, statePurpose), attach.Path(ifname, bump.PurposeHigh), attach.Path(ifname, bump.PurposeLow)} {
		if os.Remove(p) == nil {
			any = true
		}
	}
	return any
}
