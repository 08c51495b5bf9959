package ike

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"

	"github.com/missiu/missiu/pkg/crypto/alg"
	"github.com/missiu/missiu/pkg/ike/sa"
	"github.com/missiu/missiu/pkg/ipsec"
	"golang.org/x/sys/unix"
)

// KeyLog is a file into which the keys of every SA go, in the words of
// Wireshark, so that its owner can look inside a capture. Lines of IKE SAs are
// those of its file ikev2_decryption_table, lines of ESP those of esp_sa, which
// begin with a quote:
//
//	SPIi,SPIr,SK_ei,SK_er,"cipher",SK_ai,SK_ar,"integrity"
//	"IPv4","source","destination","0xSPI","cipher","0xkey","integrity","0xkey"
//
// What Wireshark has no word for is a comment, since one such line makes it
// refuse the file. AH has nothing to look inside.
type KeyLog struct {
	mu sync.Mutex
	f  *os.File
}

// OpenKeyLog opens path for appending, or makes it with mode 0600. A file that
// is not regular, not the caller's, or that others can read or write, is refused,
// and so is a symbolic link. It is not emptied: it may hold what is still needed.
func OpenKeyLog(path string) (*KeyLog, error) {
	// Without waiting for the reader of a pipe, which is then refused.
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("%s: is a symbolic link", path)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	switch perm := os.FileMode(st.Mode & 0o777); {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = errors.New("not a regular file")
	case int(st.Uid) != os.Geteuid():
		err = fmt.Errorf("owned by uid %d; want %d", st.Uid, os.Geteuid())
	case perm&0o077 != 0:
		err = fmt.Errorf("mode %04o; want 0600", perm)
	case st.Nlink != 1:
		err = fmt.Errorf("has %d names; want one", st.Nlink)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &KeyLog{f: f}, nil
}

// Close closes the file.
func (k *KeyLog) Close() error { return k.f.Close() }

func (k *KeyLog) line(known bool, text string) error {
	if !known {
		text = "# unknown to Wireshark: " + text
	}
	b := []byte(text + "\n")
	defer clear(b)
	k.mu.Lock()
	defer k.mu.Unlock()
	_, err := k.f.Write(b)
	return err
}

// ikeSA writes the line of an IKE SA.
func (k *KeyLog) ikeSA(o sa.IKEKeys) error {
	encr, known := ikeCiphers[o.Suite.Encr]
	if strings.Contains(encr, "%d") {
		encr = fmt.Sprintf(encr, o.Suite.Bits)
	}
	integ, ok := ikeIntegs[o.Suite.Integ]
	if !known {
		encr = o.Suite.Cipher.String()
	}
	if !ok {
		integ = o.Suite.Integ.String()
	}
	hexed := func(k ipsec.Key) string { return hex.EncodeToString(k.Bytes()) }
	return k.line(known && ok, fmt.Sprintf(`%016x,%016x,%s,%s,"%s",%s,%s,"%s"`, uint64(o.InitiatorSPI), uint64(o.ResponderSPI),
		hexed(o.EI), hexed(o.ER), encr, hexed(o.AI), hexed(o.AR), integ))
}

// espSA writes the line of one SA of ESP.
func (k *KeyLog) espSA(p *ipsec.SAParams) error {
	if p.Proto != ipsec.ESP {
		return nil
	}
	family := "IPv4"
	if p.Dst.Is6() {
		family = "IPv6"
	}
	encr, known := espCiphers[p.Encr]
	integ, ok := espIntegs[p.Auth]
	if !known {
		encr = p.Encr.String()
	}
	if !ok {
		integ = p.Auth.String()
	}
	hexed := func(k ipsec.Key) string {
		if k.Len() == 0 {
			return ""
		}
		return "0x" + hex.EncodeToString(k.Bytes())
	}
	return k.line(known && ok, fmt.Sprintf(`"%s","%v","%v","0x%08x","%s","%s","%s","%s"`, family, p.Src, p.Dst, uint32(p.SPI),
		encr, hexed(p.EncrKey), integ, hexed(p.AuthKey)))
}

// Wireshark's words; %d is the length of the key.
var (
	ikeCiphers = map[alg.Encr]string{
		alg.EncrAESCBC:   "AES-CBC-%d [RFC3602]",
		alg.Encr3DESCBC:  "3DES [RFC2451]",
		alg.EncrAESCTR:   "AES-CTR-%d [RFC5930]",
		alg.EncrAESGCM8:  "AES-GCM-%d with 8 octet ICV [RFC5282]",
		alg.EncrAESGCM12: "AES-GCM-%d with 12 octet ICV [RFC5282]",
		alg.EncrAESGCM16: "AES-GCM-%d with 16 octet ICV [RFC5282]",
		alg.EncrAESCCM8:  "AES-CCM-%d with 8 octet ICV [RFC5282]",
		alg.EncrAESCCM12: "AES-CCM-%d with 12 octet ICV [RFC5282]",
		alg.EncrAESCCM16: "AES-CCM-%d with 16 octet ICV [RFC5282]",
	}
	ikeIntegs = map[alg.Integ]string{
		alg.IntegNone:       "NONE [RFC4306]",
		alg.IntegHMACSHA1:   "HMAC_SHA1_96 [RFC2404]",
		alg.IntegHMACSHA256: "HMAC_SHA2_256_128 [RFC4868]",
		alg.IntegHMACSHA384: "HMAC_SHA2_384_192 [RFC4868]",
		alg.IntegHMACSHA512: "HMAC_SHA2_512_256 [RFC4868]",
	}
	espCiphers = map[alg.Encr]string{
		alg.EncrNULL:     "NULL",
		alg.EncrAESCBC:   "AES-CBC [RFC3602]",
		alg.EncrAESCTR:   "AES-CTR [RFC3686]",
		alg.EncrAESGCM8:  "AES-GCM with 8 octet ICV [RFC4106]",
		alg.EncrAESGCM12: "AES-GCM with 12 octet ICV [RFC4106]",
		alg.EncrAESGCM16: "AES-GCM with 16 octet ICV [RFC4106]",
	}
	espIntegs = map[alg.Integ]string{
		alg.IntegNone:       "NULL",
		alg.IntegHMACSHA1:   "HMAC-SHA-1-96 [RFC2404]",
		alg.IntegHMACSHA256: "HMAC-SHA-256-128 [RFC4868]",
		alg.IntegHMACSHA384: "HMAC-SHA-384-192 [RFC4868]",
		alg.IntegHMACSHA512: "HMAC-SHA-512-256 [RFC4868]",
		alg.IntegAESXCBC:    "ANY 96 bit authentication [no checking]",
		alg.IntegAESCMAC:    "ANY 96 bit authentication [no checking]",
	}
)

// tellIKE and tellESP write keys if the operator wants them.
func (d *Daemon) tellIKE(o sa.IKEKeys) {
	defer o.Wipe()
	if d.cfg.KeyLog != nil {
		d.keyLogged(d.cfg.KeyLog.ikeSA(o))
	}
}

func (d *Daemon) tellESP(p *ipsec.SAParams) {
	if d.cfg.KeyLog != nil {
		d.keyLogged(d.cfg.KeyLog.espSA(p))
	}
}

// keyLogged tells of the first failure only: a full disk is no reason to fill
// another.
func (d *Daemon) keyLogged(err error) {
	if err != nil && d.keyLogFailed.CompareAndSwap(false, true) {
		var errno syscall.Errno
		if errors.As(err, &errno) {
			err = errno // the error of a write quotes nothing, but be sure
		}
		d.log.Error("keys are not written to --keylog: " + err.Error())
	}
}
