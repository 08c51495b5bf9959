package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/missiu/missiu/test/e2e/lab"
)

// Every algorithm that charon has besides those of our default offer
// (TestInteropSuites), in both roles: of the IKE SA, that is of the SK payload, of PRF
// and key exchange, and of ESP, with PFS. charon's proposals have one algorithm of
// each kind, so that a connection is an agreement on just these.
func TestInteropAlgorithms(t *testing.T) {
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	extra := filepath.Join(cache, "missiu-strongswan/usr/lib/ipsec/plugins")
	haveFile(t, extra+"/libstrongswan-cmac.so", "libstrongswan-extra-plugins (scripts/setup)")
	d := newDuoWith(t, " ctr ccm cmac", func(b *lab.Host) {
		b.Sh("mkdir plugins; cp /usr/lib/ipsec/plugins/*.so " + extra + "/libstrongswan-{ctr,ccm,cmac}.so plugins; mount --bind plugins /usr/lib/ipsec/plugins")
	}, "")
	const more = ` prf sha1, sha256, sha384, sha512, aes-xcbc, aes-cmac
		dh_group x25519, 14, 15, 16, 17, 18, 19, 20, 21, 27, 28, 29, 30, x448 }
`
	d.rule(`ikesa_xform { encr_alg aes-gcm-8, aes-gcm-12, aes-gcm-16, aes-ccm-8, aes-ccm-12, aes-ccm-16, chacha20-poly1305` + more +
		`ikesa_xform { encr_alg aes, aes-ctr, 3des auth_alg sha1, sha256, sha384, sha512, aes-xcbc, aes-cmac` + more)
	for _, c := range []struct{ ike, esp, policy string }{
		{"aes128-aescmac-prfaescmac-curve448", "aes128ccm8-curve448", "encr_algs aes-ccm-8(128)"},
		{"aes192-aesxcbc-prfaesxcbc-ecp521", "aes192ccm12-ecp521", "encr_algs aes-ccm-12(192)"},
		{"aes256ccm16-prfsha256-ecp256bp", "aes256ccm16-ecp256bp", "encr_algs aes-ccm-16(256)"},
		{"aes128ccm8-prfaescmac-ecp384bp", "aes128-aescmac-ecp384bp", "encr_algs aes(128) encr_auth_algs cmac"},
		{"aes192ccm12-prfsha384-ecp512bp", "aes256-aesxcbc-ecp512bp", "encr_algs aes(256) encr_auth_algs xcbc"},
		{"aes128ctr-sha256-prfsha256-ecp224bp", "aes128gcm8-ecp224bp", "encr_algs aes-gcm-8(128)"},
		{"aes192ctr-aescmac-prfsha512-modp6144", "aes192gcm12-modp6144", "encr_algs aes-gcm-12(192)"},
		{"aes256ctr-sha512-prfsha512-modp8192", "aes256gcm8-modp3072", "encr_algs aes-gcm-8(256)"},
		{"aes128gcm8-prfsha256-modp3072", "aes256gcm12-ecp384", "encr_algs aes-gcm-12(256)"},
		{"aes192gcm12-prfsha384-ecp256", "aes128gcm16-ecp256", "encr_algs aes-gcm-16(128)"},
		{"aes256gcm8-prfaesxcbc-ecp384", "chacha20poly1305-curve25519", "encr_algs chacha20-poly1305"},
		{"chacha20poly1305-prfaescmac-curve25519", "aes128ctr-sha256-modp4096", "encr_algs ctr(128) encr_auth_algs sha256"},
		{"3des-sha1-prfsha1-modp2048", "aes256ctr-sha512-modp2048", "encr_algs ctr(256) encr_auth_algs sha512"},
	} {
		t.Run(c.ike+" "+c.esp, func(t *testing.T) {
			d.t = t
			d.peer("proposals = "+c.ike, "esp_proposals = "+c.esp)
			d.policy(c.policy)
			for _, we := range []bool{true, false} {
				who := map[bool]string{true: "we initiate", false: "they initiate"}[we]
				if !we {
					d.up()
				}
				d.pings(who)
				// The first child SA has no key exchange of its own.
				d.b.Must("swanctl", "--rekey", "--child", "t")
				lab.Until(t, 20*time.Second, "a child SA with PFS", func() (bool, string) {
					s := d.b.Must("swanctl", "--list-sas", "--raw")
					return strings.Count(s, " dh-group=") == 2, s
				})
				d.pings(who + ", child rekeyed")
				d.down()
			}
		})
	}
}

func haveFile(t *testing.T, path, pkg string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		t.Skipf("package %s is not there", pkg)
	}
}
