package wire

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/missiu/missiu/pkg/datapath/statefile"
)

const sysctlDir = "/proc/sys/net/ipv4/conf"

// rpFile keeps the interface's own value of rp_filter while ours is set.
func rpFile(ifname string) string { return filepath.Join(Dir, ifname+".rp_filter") }

func rpSysctl(ifname string) string { return filepath.Join(sysctlDir, ifname, "rp_filter") }

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

// loosenReversePath makes strict reverse path filtering loose (RFC 3704, 2.4):
// a peer's route may lead into the TAP while its IKE arrives here. What counts
// is the larger of the values of "all" and of the interface.
func loosenReversePath(ifname string) error {
	own, err := readSysctl(rpSysctl(ifname))
	if errors.Is(err, os.ErrNotExist) {
		return nil // no IPv4 on it
	}
	if err != nil {
		return err
	}
	all, err := readSysctl(rpSysctl("all"))
	if err != nil {
		return err
	}
	if max(own, all) != "1" { // one digit each
		return nil
	}
	if savedReversePath(ifname) == "" { // else a killed instance's: the older one counts
		if err := statefile.Write(rpFile(ifname), []byte(own+"\n")); err != nil {
			return err
		}
	}
	return os.WriteFile(rpSysctl(ifname), []byte("2"), 0)
}

// savedReversePath returns the value to be restored, "" if there is none.
func savedReversePath(ifname string) string {
	b, err := os.ReadFile(rpFile(ifname))
	if err != nil {
		return ""
	}
	switch v := strings.TrimSpace(string(b)); v {
	case "0", "1", "2":
		return v
	}
	return ""
}

// restoreReversePath undoes loosenReversePath, unless somebody has changed the
// value since.
func restoreReversePath(ifname string) error {
	old := savedReversePath(ifname)
	if old == "" {
		return nil
	}
	if now, err := readSysctl(rpSysctl(ifname)); err == nil && now == "2" {
		if err := os.WriteFile(rpSysctl(ifname), []byte(old), 0); err != nil {
			return err
		}
	}
	return os.Remove(rpFile(ifname))
}
