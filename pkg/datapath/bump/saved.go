package bump

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/missiu/missiu/pkg/datapath/statefile"
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
	return statefile.Write(statePath(ifname), append(data, '\n'))
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
