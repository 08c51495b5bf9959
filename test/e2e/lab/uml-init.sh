#!/bin/sh
# Process 1 of the Linux peer: loads what IPsec needs, then runs the scripts
# whose numbers arrive on the console and leaves output and exit status beside them.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs run /run
mkdir /run/lab
mount -t hostfs -o @DIR@ hostfs /run/lab
cd /run/lab

modules=/usr/lib/uml/modules/$(uname -r)/kernel
for m in \
	lib/crc-ccitt net/ipv6/ipv6 net/ipv4/tunnel4 net/ipv6/tunnel6 \
	net/xfrm/xfrm_algo net/xfrm/xfrm_user \
	crypto/hmac crypto/sha512_generic crypto/drbg crypto/seqiv crypto/echainiv \
	crypto/cbc crypto/ctr crypto/authenc crypto/authencesn \
	crypto/gf128mul crypto/ghash-generic crypto/gcm \
	lib/crypto/libchacha crypto/chacha_generic lib/crypto/libpoly1305 crypto/poly1305_generic crypto/chacha20poly1305 \
	net/ipv4/ah4 net/ipv4/esp4 net/ipv6/ah6 net/ipv6/esp6 net/ipv4/xfrm4_tunnel net/ipv6/xfrm6_tunnel
do
	insmod $modules/$m.ko || echo "lab: cannot load $m"
done
echo 0 >/proc/sys/net/ipv6/conf/all/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
echo 0 >/proc/sys/net/ipv6/conf/vec0/accept_dad
ip link set lo up
echo "lab: ready"

while read -r id; do
	[ "$id" = quit ] && break
	sh "/run/lab/cmd.$id" >"/run/lab/out.$id" 2>&1 </dev/null
	echo $? >"/run/lab/rc.tmp"
	mv /run/lab/rc.tmp "/run/lab/rc.$id"
done
# As process 1 it must not end before the machine does.
echo o >/proc/sysrq-trigger
poweroff -f
