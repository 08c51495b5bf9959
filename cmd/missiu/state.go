package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/missiu/missiu/pkg/attach"
	"github.com/missiu/missiu/pkg/capture"
	"github.com/missiu/missiu/pkg/datapath/bump"
	"github.com/missiu/missiu/pkg/ipsec"
	"github.com/missiu/missiu/pkg/keysock"
)

// The policies in force are kept in a file while the daemon runs. One that was
// killed leaves it behind, and the next one starts with them: an instance that
// adopts the routes of its predecessor with an empty SPD would send in clear
// what they protect. An orderly stop removes the file. There are no keys in it.

func statePath(ifname string) string { return filepath.Join(keysock.Dir, ifname+".policies") }

// savePolicies replaces the file in one step.
func savePolicies(ifname string, ps []ipsec.Policy) error {
	b, err := json.Marshal(ps)
	if err != nil {
		return err
	}
	path := statePath(ifname)
	tmp := path + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// loadPolicies returns what a killed instance left, nil if there is nothing.
func loadPolicies(ifname string) ([]ipsec.Policy, error) {
	b, err := os.ReadFile(statePath(ifname))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var ps []ipsec.Policy
	if err := json.Unmarshal(b, &ps); err != nil {
		return nil, fmt.Errorf("%s: %w", statePath(ifname), err)
	}
	return ps, nil
}

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
