/* SPDX-License-Identifier: Apache-2.0
 *
 * Packets as they are on the wire, and the program's view of them
 * (include/uapi/linux/bpf.h, RFC 791, 8200, 9293, IEEE 802.1Q).
 */
#pragma once

#include "ckbpf.h"

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
};

#define TCX_NEXT -1

#define ETH_HEADER 14
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8

#define IPPROTO_HOPOPTS 0
#define IPPROTO_TCP 6
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_DSTOPTS 60

#define swap16(x) __builtin_bswap16(x)
#define swap32(x) __builtin_bswap32(x)

struct ipv4 {
	__u8 version_words, tos;
	__u16 length, id, fragment;
	__u8 ttl, protocol;
	__u16 sum;
	__u32 from, to;
};

struct ipv6 {
	__u32 version_class_flow;
	__u16 length;
	__u8 next, hops;
	__u32 from[4], to[4];
};

struct tcp {
	__u16 from, to;
	__u32 seq, ack;
	__u8 words, flags;
	__u16 window, sum, urgent;
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16
