// Package statefile writes what a daemon that is killed leaves for its successor, or for
// "stop", to undo: small files in /run. It may be imported from anywhere in the data path.
package statefile

import (
	"os"
	"path/filepath"
)

// Write puts data in the place of what the file path holds, at once: whoever reads it
// finds the one or the other, whole. The file has mode 0600; its directory is made if
// there is none (0755). It is not synced: what it tells of does not outlive the system.
// There may be one writer at a time, who uses path + ".new".
func Write(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
