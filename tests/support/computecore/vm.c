/* The systems: what is attached, mounted and granted, and what documents make of it.
 *
 * A document is as hcsshim sends it, or is refused and a violation: members, their order, what
 * is left out, the grammar of a resource path.
 */
#include "fake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONTROLLERS 4
#define LUNS 64
#define MOUNTS 512

static const char *const guids[CONTROLLERS] = {
    "df6d0690-79e5-55b6-a5ec-c1e2f77f580a",
    "0110f83b-de10-5172-a266-78bca56bf50a",
    "b5d2d8d4-3a75-51bf-945b-3444dc6b8579",
    "305891a9-b251-5dfe-91a2-c25d9212275b",
};

typedef struct {
    char *path;
    bool read_only, unplugged;
} Disk;

typedef struct {
    char *path;
    int controller, lun;
} Mount;

struct System {
    char *id, *runtime_id, *os_type, *connection;
    bool stopped, silent;
    Disk disks[CONTROLLERS][LUNS];
    Mount mounts[MOUNTS];
    System *next;
};

static System *systems;

typedef struct Grant {
    char *vm_id, *path;
    struct Grant *next;
} Grant;

static Grant *grants;

System *system_find(const char *id) {
    System *system = systems;
    while (system && strcmp(system->id, id))
        system = system->next;
    return system;
}

bool system_runs(const System *system) { return !system->stopped; }

char *error_document(HRESULT code, const char *message) {
    Text text = {0};
    text_print(&text, "{\"Error\":%d,\"ErrorMessage\":", code);
    text_quoted(&text, message);
    text_print(&text, ",\"ErrorEvents\":[{\"Message\":");
    text_quoted(&text, message);
    text_print(&text, ",\"Provider\":\"fake\",\"EventId\":1}]}");
    return text.data;
}

static HRESULT refuse(HRESULT code, const char *message, char **result) {
    *result = error_document(code, message);
    return code;
}

static HRESULT misunderstand(const char *why, const char *document, char **result) {
    violation("a document with %s: %s", why, document);
    return refuse(INVALID_JSON, why, result);
}

/* --- Shapes --- */

/* Whether an object has just these members, in this order; "?" before one that may be missing. */
static bool has_members(const Json *object, const char *const *names) {
    if (!object || object->kind != J_OBJECT)
        return false;
    const Json *child = object->first;
    for (; *names; names++) {
        bool may_miss = **names == '?';
        const char *name = *names + may_miss;
        if (child && !strcmp(child->name, name))
            child = child->next;
        else if (!may_miss)
            return false;
    }
    return !child;
}

#define MEMBERS(...) ((const char *const[]){__VA_ARGS__, NULL})

static bool is_true_or_missing(const Json *object, const char *name) {
    const Json *found = json_member(object, name);
    return !found || (found->kind == J_BOOL && found->boolean);
}

/* A number from 1 to the most, or missing, which is 0; -1 for anything else. */
static int number(const Json *object, const char *name, int most) {
    const Json *found = json_member(object, name);
    if (!found)
        return 0;
    int value = (int)found->number;
    return found->kind == J_NUMBER && value == found->number && value > 0 && value < most ? value : -1;
}

static bool slot_of(const char *path, int *controller, int *lun) {
    *lun = -1;
    static const char before[] = "VirtualMachine/Devices/Scsi/", between[] = "/Attachments/";
    if (strncmp(path, before, sizeof before - 1))
        return false;
    path += sizeof before - 1;
    for (*controller = 0; *controller < CONTROLLERS; ++*controller) {
        const char *guid = guids[*controller];
        if (strncmp(path, guid, strlen(guid)))
            continue;
        path += strlen(guid);
        if (strncmp(path, between, sizeof between - 1))
            return false;
        char *end, again[8];
        *lun = (int)strtol(path + sizeof between - 1, &end, 10);
        if (*end || *lun < 0 || *lun >= LUNS)
            return false;
        snprintf(again, sizeof again, "%d", *lun); /* neither sign nor zeros in front */
        return !strcmp(again, path + sizeof between - 1);
    }
    return false;
}

/* --- Disks --- */

static bool is_attachment(const Json *settings) {
    const char *type = json_string(settings, "Type"), *path = json_string(settings, "Path");
    if (!type || !path || !*path || !is_true_or_missing(settings, "ReadOnly"))
        return false;
    if (!strcmp(type, "ExtensibleVirtualDisk")) {
        const char *provider = json_string(settings, "ExtensibleVirtualDiskType");
        return provider && *provider &&
               has_members(settings, MEMBERS("Type", "Path", "?ReadOnly", "ExtensibleVirtualDiskType"));
    }
    return (!strcmp(type, "VirtualDisk") || !strcmp(type, "PassThru")) &&
           has_members(settings, MEMBERS("Type", "Path", "?ReadOnly"));
}

static HRESULT attach(System *system, const Json *root, int controller, int lun, char **result) {
    const Json *settings = json_member(root, "Settings");
    const char *path = json_string(settings, "Path");
    if (system->disks[controller][lun].path)
        return refuse(ALREADY_EXISTS, "there is an attachment at this LUN", result);
    if (strstr(path, "missing"))
        return refuse(FILE_NOT_FOUND, "the file is not there", result);
    for (int c = 0; c < CONTROLLERS; c++)
        for (int l = 0; l < LUNS; l++)
            if (system->disks[c][l].path && !strcmp(system->disks[c][l].path, path))
                return refuse(SHARING_VIOLATION, "the file is in use", result);
    system->disks[controller][lun] = (Disk){
        .path = strdup(path),
        .read_only = json_member(settings, "ReadOnly") != NULL,
    };
    return S_OK;
}

static HRESULT detach(System *system, int controller, int lun, char **result) {
    Disk *disk = &system->disks[controller][lun];
    if (!disk->path)
        return refuse(NOT_FOUND, "there is no attachment at this LUN", result);
    free(disk->path);
    *disk = (Disk){0};
    return S_OK;
}

static HRESULT modify_disk(System *system, const Json *root, const char *text, char **result) {
    const char *path = json_string(root, "ResourcePath"), *verb = json_string(root, "RequestType");
    int controller = 0, lun = 0;
    if (!path || !slot_of(path, &controller, &lun))
        return misunderstand("a wrong ResourcePath", text, result);
    if (verb && !strcmp(verb, "Add") &&
        has_members(root, MEMBERS("ResourcePath", "RequestType", "Settings"))) {
        if (!is_attachment(json_member(root, "Settings")))
            return misunderstand("Settings that are no attachment", text, result);
        return attach(system, root, controller, lun, result);
    }
    if (verb && !strcmp(verb, "Remove") && has_members(root, MEMBERS("ResourcePath", "RequestType")))
        return detach(system, controller, lun, result);
    return misunderstand("a wrong RequestType or other members", text, result);
}

/* --- The guest --- */

static Mount *mount_at(System *system, const char *path) {
    for (int n = 0; n < MOUNTS; n++)
        if (system->mounts[n].path ? path && !strcmp(system->mounts[n].path, path) : !path)
            return &system->mounts[n];
    return NULL;
}

static HRESULT mount(System *system, const char *path, int controller, int lun, char **result) {
    const Disk *disk = &system->disks[controller][lun];
    if (!disk->path || disk->unplugged)
        return refuse(E_FAIL, "mounting: there is no such device", result);
    if (!strncmp(path, "/proc/", 6))
        return refuse(E_FAIL, "mounting: no such file or directory", result);
    Mount *free_one = mount_at(system, NULL);
    if (!free_one || mount_at(system, path))
        return refuse(E_FAIL, "mounting: the path is taken", result);
    *free_one = (Mount){strdup(path), controller, lun};
    return S_OK;
}

static HRESULT unmount(System *system, const char *path, int controller, int lun) {
    Mount *found = mount_at(system, path);
    if (found && found->controller == controller && found->lun == lun) {
        free(found->path);
        *found = (Mount){0};
    }
    return S_OK; /* as the agent says when there is nothing at the path */
}

static bool is_linux_mount(const Json *settings) {
    return has_members(settings, MEMBERS("MountPath", "?Lun", "?Controller", "?Partition", "?ReadOnly",
                                         "?Encrypted", "?Options", "?BlockDev", "?EnsureFilesystem",
                                         "?Filesystem")) &&
           is_true_or_missing(settings, "ReadOnly") && is_true_or_missing(settings, "Encrypted") &&
           is_true_or_missing(settings, "BlockDev") && is_true_or_missing(settings, "EnsureFilesystem");
}

static HRESULT ask_guest(System *system, const Json *request, const char *text, char **result) {
    const char *verb = json_string(request, "RequestType"), *what = json_string(request, "ResourceType");
    const Json *settings = json_member(request, "Settings");
    if (!has_members(request, MEMBERS("RequestType", "ResourceType", "Settings")) || !verb || !what)
        return misunderstand("a wrong GuestRequest", text, result);
    bool is_windows = !strcmp(system->os_type, "Windows"), adds = !strcmp(verb, "Add");
    int controller = number(settings, "Controller", CONTROLLERS), lun = number(settings, "Lun", LUNS);
    if ((!adds && strcmp(verb, "Remove")) || controller < 0 || lun < 0)
        return misunderstand("a GuestRequest of wrong values", text, result);
    if (!strcmp(what, "SCSIDevice") && !adds && !is_windows &&
        has_members(settings, MEMBERS("?Controller", "?Lun"))) {
        system->disks[controller][lun].unplugged = true;
        return S_OK;
    }
    const char *path = json_string(settings, is_windows ? "ContainerPath" : "MountPath");
    bool scratch = is_windows && adds && !strcmp(what, "MappedVirtualDiskForContainerScratch");
    bool shape = is_windows ? has_members(settings, MEMBERS("ContainerPath", "?Lun"))
                            : is_linux_mount(settings);
    if (!path || !*path || !shape || !(scratch || !strcmp(what, "MappedVirtualDisk")))
        return misunderstand("a GuestRequest of another shape", text, result);
    return adds ? mount(system, path, controller, lun, result)
                : unmount(system, path, controller, lun);
}

HRESULT system_modify(System *system, const char *text, char **result) {
    if (system->stopped)
        return refuse(ALREADY_STOPPED, "the system has exited", result);
    Json *root = json_parse(text);
    const Json *request = json_member(root, "GuestRequest");
    HRESULT code;
    if (!root)
        code = misunderstand("no JSON", text, result);
    else if (request)
        code = has_members(root, MEMBERS("GuestRequest"))
                   ? ask_guest(system, request, text, result)
                   : misunderstand("more than a GuestRequest", text, result);
    else
        code = modify_disk(system, root, text, result);
    json_free(root);
    return code;
}

/* --- Properties --- */

static void describe(const System *system, Text *text) {
    text_print(text, "\"Id\":");
    text_quoted(text, system->id);
    text_print(text, ",\"SystemType\":\"VirtualMachine\",\"RuntimeId\":\"%s\"", system->runtime_id);
    text_print(text, ",\"RuntimeOsType\":\"%s\",\"Owner\":\"fake\",\"State\":\"%s\"", system->os_type,
               system->stopped ? "Stopped" : "Running");
}

static void describe_disks(const System *system, Text *text) {
    text_print(text, ",\"MappedVirtualDiskControllers\":{");
    for (int c = 0; c < CONTROLLERS; c++) {
        text_print(text, "%s\"%d\":{\"MappedVirtualDisks\":{", c ? "," : "", c);
        const char *comma = "";
        for (int l = 0; l < LUNS; l++) {
            const Disk *disk = &system->disks[c][l];
            if (!disk->path)
                continue;
            text_print(text, "%s\"%d\":{\"HostPath\":", comma, l);
            text_quoted(text, disk->path);
            text_print(text, ",\"Lun\":%d%s,\"AttachOnly\":true}", l, disk->read_only ? ",\"ReadOnly\":true" : "");
            comma = ",";
        }
        text_print(text, "}}");
    }
    text_print(text, "}");
}

static bool asks_for(const Json *query, const char *member, const char *name) {
    const Json *wanted = json_member(query, member);
    for (const Json *one = wanted ? wanted->first : NULL; one; one = one->next)
        if (one->kind == J_STRING && !strcmp(one->string, name))
            return true;
    return false;
}

HRESULT system_properties(System *system, const char *query, char **result) {
    Json *root = json_parse(query);
    if (!root || !has_members(root, MEMBERS("?PropertyTypes"))) {
        json_free(root);
        return misunderstand("a wrong PropertyQuery", query, result);
    }
    if (system->stopped) {
        json_free(root);
        return refuse(ALREADY_STOPPED, "the system has exited", result);
    }
    Text text = {0};
    text_print(&text, "{");
    describe(system, &text);
    if (asks_for(root, "PropertyTypes", "GuestConnection") && system->connection) {
        text_print(&text, ",\"GuestConnectionInfo\":");
        text_add(&text, system->connection, strlen(system->connection));
    }
    if (asks_for(root, "PropertyTypes", "MappedVirtualDisk") && !system->silent)
        describe_disks(system, &text);
    text_print(&text, "}");
    json_free(root);
    *result = text.data;
    return S_OK;
}

HRESULT systems_enumerate(const char *query, char **result) {
    Json *root = json_parse(query);
    if (!root || !has_members(root, MEMBERS("?Types", "?Owners"))) {
        json_free(root);
        return misunderstand("a wrong SystemQuery", query, result);
    }
    Text text = {0};
    const char *comma = "";
    text_print(&text, "[");
    for (const System *system = systems; system; system = system->next) {
        if ((json_member(root, "Types") && !asks_for(root, "Types", "VirtualMachine")) ||
            (json_member(root, "Owners") && !asks_for(root, "Owners", "fake")))
            continue;
        text_print(&text, "%s{", comma);
        describe(system, &text);
        text_print(&text, "}");
        comma = ",";
    }
    text_print(&text, "]");
    json_free(root);
    *result = text.data;
    return S_OK;
}

/* --- Access --- */

HRESULT access_change(bool grant, const WCHAR16 *vm_id, const WCHAR16 *path) {
    char *id = text_in(vm_id, "a VM's id"), *file = text_in(path, "a path");
    HRESULT code = E_INVALIDARG;
    if (id && file && *id && *file) {
        Grant **at = &grants;
        while (*at && (strcmp((*at)->vm_id, id) || strcmp((*at)->path, file)))
            at = &(*at)->next;
        code = S_OK;
        if (strstr(file, "missing"))
            code = FILE_NOT_FOUND;
        else if (grant && !*at) {
            *at = malloc(sizeof **at);
            **at = (Grant){strdup(id), strdup(file), NULL};
        } else if (!grant && *at) {
            Grant *gone = *at;
            *at = gone->next;
            free(gone->vm_id);
            free(gone->path);
            free(gone);
        }
    }
    free(id);
    free(file);
    return code;
}

/* --- For the test --- */

EXPORT void fake_system(const char *id, const char *runtime_id, const char *os_type) {
    pthread_mutex_lock(&lock);
    System *system = calloc(1, sizeof *system);
    system->id = strdup(id);
    system->runtime_id = strdup(runtime_id);
    system->os_type = strdup(os_type);
    system->next = systems;
    systems = system;
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_terminate(const char *id) {
    pthread_mutex_lock(&lock);
    system_find(id)->stopped = true;
    pthread_mutex_unlock(&lock);
}

/* GuestConnectionInfo as JSON; and whether the service tells which disks there are. */
EXPORT void fake_tells(const char *id, const char *connection, int tells_disks) {
    pthread_mutex_lock(&lock);
    System *system = system_find(id);
    free(system->connection);
    system->connection = connection ? strdup(connection) : NULL;
    system->silent = !tells_disks;
    pthread_mutex_unlock(&lock);
}

EXPORT void fake_attach(const char *id, int controller, int lun, const char *path) {
    pthread_mutex_lock(&lock);
    system_find(id)->disks[controller][lun].path = strdup(path);
    pthread_mutex_unlock(&lock);
}

/* {"disks":[[controller,lun,path,read_only,unplugged]],"mounts":[[path,c,l]],"grants":[[id,path]]} */
EXPORT char *fake_state(const char *id) {
    pthread_mutex_lock(&lock);
    const System *system = system_find(id);
    const char *comma = "";
    Text text = {0};
    text_print(&text, "{\"disks\":[");
    for (int c = 0; c < CONTROLLERS; c++)
        for (int l = 0; l < LUNS; l++) {
            const Disk *disk = &system->disks[c][l];
            if (!disk->path)
                continue;
            text_print(&text, "%s[%d,%d,", comma, c, l);
            text_quoted(&text, disk->path);
            text_print(&text, ",%d,%d]", disk->read_only, disk->unplugged);
            comma = ",";
        }
    text_print(&text, "],\"mounts\":[");
    comma = "";
    for (int n = 0; n < MOUNTS; n++)
        if (system->mounts[n].path) {
            text_print(&text, "%s[", comma);
            text_quoted(&text, system->mounts[n].path);
            text_print(&text, ",%d,%d]", system->mounts[n].controller, system->mounts[n].lun);
            comma = ",";
        }
    text_print(&text, "],\"grants\":[");
    comma = "";
    for (const Grant *grant = grants; grant; grant = grant->next) {
        text_print(&text, "%s[", comma);
        text_quoted(&text, grant->vm_id);
        text_print(&text, ",");
        text_quoted(&text, grant->path);
        text_print(&text, "]");
        comma = ",";
    }
    text_print(&text, "]}");
    pthread_mutex_unlock(&lock);
    return text.data;
}

void systems_forget(void) {
    while (systems) {
        System *system = systems;
        systems = system->next;
        for (int c = 0; c < CONTROLLERS; c++)
            for (int l = 0; l < LUNS; l++)
                free(system->disks[c][l].path);
        for (int n = 0; n < MOUNTS; n++)
            free(system->mounts[n].path);
        free(system->id);
        free(system->runtime_id);
        free(system->os_type);
        free(system->connection);
        free(system);
    }
    while (grants) {
        Grant *grant = grants;
        grants = grant->next;
        free(grant->vm_id);
        free(grant->path);
        free(grant);
    }
}
