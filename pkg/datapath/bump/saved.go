package bump

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// saved is the state file.
type saved struct {
	High, Low State
	LRO       string
	Guarded   int // index of the interface that has the guard
	Clsact    int // index of the one whose clsact is ours; 0: none
}

func statePath(ifname string) string { return filepath.Join(Dir, ifname+".bump") }

func saveState(ifname string, s saved) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	path := statePath(ifname)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(data, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func loadState(ifname string) (s saved, err error) {
	data, err := os.ReadFile(statePath(ifname))
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err == nil && (s.High > Active || s.Low > Active) {
		err = fmt.Errorf("%s: no such state", statePath(ifname))
	}
	return s, err
}
