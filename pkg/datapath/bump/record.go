package bump

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/missiu/missiu/pkg/datapath/statefile"
)

// record is what a successor has to know.
type record struct {
	Phase string
	NIC   string // its name in the namespace
	Back  string // what it is called when it is back, if not as before: "" as yet
	Why   string // it is not what it was, in the file of LostPath
	Had   *settings
}

// Phases of the journey.
const (
	leaving   = "leaving"
	outside   = "outside"
	returning = "returning"
)

func awayDir(ifname string) string    { return filepath.Join(Dir, ifname+".ns") }
func pinPath(ifname string) string    { return filepath.Join(awayDir(ifname), "net") }
func recordPath(ifname string) string { return filepath.Join(awayDir(ifname), "record") }

// loadRecord returns nil if there is none.
func loadRecord(ifname string) (*record, error) { return readRecord(recordPath(ifname)) }

func readRecord(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	rec := new(record)
	if err == nil {
		err = json.Unmarshal(data, rec)
	}
	if err == nil && rec.Had == nil {
		err = errors.New("incomplete")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return rec, nil
}

// save replaces the record, which is nobody else's to read: sysctls may hold a secret.
func (r *record) save(ifname, phase string) error {
	r.Phase = phase
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return statefile.Write(recordPath(ifname), data)
}

// Stay is the stay of an interface in its private namespace, under one process.
type Stay struct{ record os.FileInfo }

// StayOf returns the present one.
func StayOf(ifname string) Stay {
	s, _ := os.Stat(recordPath(ifname))
	return Stay{s}
}

// Over reports whether another process has taken over since, or the interface is back. It is
// not where the process has died on the way back.
func (s Stay) Over(ifname string) bool {
	now, err := os.Stat(recordPath(ifname))
	if err != nil {
		return errors.Is(err, os.ErrNotExist)
	}
	if s.record != nil && os.SameFile(s.record, now) && s.record.ModTime().Equal(now.ModTime()) {
		return false
	}
	rec, err := loadRecord(ifname)
	return err == nil && rec != nil && rec.Phase != returning
}
